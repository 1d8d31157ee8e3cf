-- Take keys that are due, for a lease. A key whose runner let its lease run out is taken over with all that it had.
--
-- KEYS[1]    due
-- KEYS[2]    counts
-- KEYS[3]    claims: list of the last ones, the newest first: fence and key
-- KEYS[4..]  state, one per key
-- ARGV[1]    lease, ms
-- ARGV[2..]  the keys
-- Replies, per key: nothing ("") if it is somebody's or not due any more, else
--   {version, fence, arguments, calls (see request.lua), first trigger, wanted, "1" if taken over, ms since the first request}
local REMEMBERED = 256  -- claims

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ends = string.format('%.0f', now + tonumber(ARGV[1]))
local replies, claimed = {}, false
for n = 4, #KEYS do
  local key = ARGV[n - 2]
  local score = redis.call('ZSCORE', KEYS[1], key)
  local reply = ''
  if score and tonumber(score) <= now then
    local state = redis.call('HMGET', KEYS[n], 'asked', 'running', 'arguments', 'calls', 'opener', 'wanted', 'first',
      'claimed_calls', 'claimed_opener', 'claimed_wanted', 'claimed_first')
    if not state[1] then
      redis.call('ZREM', KEYS[1], key)  -- its state was lost
    else
      local calls, opener, wanted, first = state[4] or '', state[5], state[6], state[7]
      if state[2] then
        calls = state[8] .. calls
        opener, first = state[9], state[11]
        if state[10] == '1' then wanted = '1' end
      end
      local fence = redis.call('HINCRBY', KEYS[2], 'fence', 1)
      redis.call('LPUSH', KEYS[3], string.format('%.0f', fence) .. ' ' .. key)
      claimed = true
      redis.call('HSET', KEYS[n], 'running', state[1], 'fence', string.format('%.0f', fence), 'claimed_calls', calls,
        'claimed_opener', opener, 'claimed_wanted', wanted or '0', 'claimed_first', first)
      redis.call('HDEL', KEYS[n], 'calls', 'opener', 'wanted', 'first', 'last')
      redis.call('ZADD', KEYS[1], ends, key)
      reply = {tonumber(state[1]), fence, state[3], calls, opener, wanted or '0', state[2] and '1' or '0', now - tonumber(first)}
    end
  end
  replies[#replies + 1] = reply
end
if claimed then redis.call('LTRIM', KEYS[3], 0, REMEMBERED - 1) end
return replies
