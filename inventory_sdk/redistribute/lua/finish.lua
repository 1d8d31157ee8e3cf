-- A run has ended; or its runner gives it back, for somebody else to run it.
--
-- KEYS[1]   due
-- KEYS[2]   counts
-- KEYS[3]   state of the key
-- ARGV[1]   key
-- ARGV[2]   fence
-- ARGV[3]   "1" it has ended, "0" it is given back
-- ARGV[4]   outcome (JSON), "" where nobody waits for it
-- ARGV[5]   debounce, ms
-- ARGV[6]   max_wait, ms
-- ARGV[7]   ms that the key has to rest now (its CPU budget)
-- ARGV[8]   ms that the outcome is kept
-- ARGV[9..] two per trigger: its name, CPU microseconds it is charged with
-- Replies: -2 it was not ours any more, and nothing was changed; -1 nothing waits; else ms until the key is due again
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local state = redis.call('HMGET', KEYS[3], 'running', 'fence', 'asked', 'first', 'last', 'claimed_opener')
if not state[1] or state[2] ~= ARGV[2] then return -2 end
if ARGV[3] == '0' then
  redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[1])
  return 0
end
local rests = now + tonumber(ARGV[7])
redis.call('HSET', KEYS[3], 'done', state[1], 'rest', string.format('%.0f', rests))
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[3], 'outcome', ARGV[4], 'outcome_of', state[1])
end
redis.call('HDEL', KEYS[3], 'running', 'fence', 'claimed_calls', 'claimed_opener', 'claimed_wanted', 'claimed_first')
redis.call('HINCRBY', KEYS[2], 'runs\31' .. state[6], 1)
for n = 9, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[2], 'cpu\31' .. ARGV[n], ARGV[n + 1])
end
if tonumber(state[3]) > tonumber(state[1]) then
  local due = math.max(math.min(tonumber(state[5]) + tonumber(ARGV[5]), tonumber(state[4]) + tonumber(ARGV[6])), rests, now)
  redis.call('ZADD', KEYS[1], string.format('%.0f', due), ARGV[1])
  return due - now
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[3], string.format('%.0f', math.max(tonumber(ARGV[8]), rests - now)))
return -1
