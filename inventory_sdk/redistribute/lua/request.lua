-- Note that keys are to be calculated (again). Repeating it is harmless: at the worst there is one run more.
--
-- KEYS[1]    due: sorted set, key → the time (ms) at which somebody should look at it
-- KEYS[2]    counts: hash of the function (versions, fences, what its triggers did)
-- KEYS[3..]  state: one hash per key
-- ARGV[1]    debounce, ms: a key rests that long after its last request …
-- ARGV[2]    max_wait, ms: … but no longer than this after the first one that waits
-- ARGV[3..]  five per key: key, arguments (JSON), wanted ("1": somebody waits for the outcome), calls by trigger (JSON), first trigger
-- Replies, in one string (a client parses it the quickest), per key: version, ms until it is due (-1: it is being calculated, and is due once that has ended)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local debounce, longest = tonumber(ARGV[1]), tonumber(ARGV[2])
local replies, counted, scores = {}, {}, {}
local before = redis.call('HINCRBY', KEYS[2], 'version', #KEYS - 2) - (#KEYS - 2)
for n = 3, #KEYS do
  local at = 3 + (n - 3) * 5
  local key, arguments, wanted, calls, opener = ARGV[at], ARGV[at + 1], ARGV[at + 2], cjson.decode(ARGV[at + 3]), ARGV[at + 4]
  local version = before + n - 2
  local state = redis.call('HMGET', KEYS[n], 'asked', 'done', 'running', 'first', 'calls', 'wanted', 'rest', 'opener')
  local running = state[3]
  local waits = tonumber(state[1] or 0) > tonumber(running or state[2] or 0)
  local first = now
  for trigger, count in pairs(calls) do
    counted[trigger] = (counted[trigger] or 0) + count
  end
  if waits then
    first = tonumber(state[4])
    opener = state[8]
    if state[6] == '1' then wanted = '1' end
    for trigger, count in pairs(cjson.decode(state[5])) do
      calls[trigger] = (calls[trigger] or 0) + count
    end
  end
  redis.call('HSET', KEYS[n], 'asked', string.format('%.0f', version), 'first', string.format('%.0f', first),
    'last', string.format('%.0f', now), 'arguments', arguments, 'calls', cjson.encode(calls), 'wanted', wanted, 'opener', opener)
  if not waits then redis.call('PERSIST', KEYS[n]) end  -- one that waits lives until it has been answered
  local due = math.max(math.min(now + debounce, first + longest), tonumber(state[7] or 0))
  if running then
    due = now - 1
  else
    scores[#scores + 1] = string.format('%.0f', due)
    scores[#scores + 1] = key
  end
  replies[#replies + 1] = string.format('%.0f', version)
  replies[#replies + 1] = string.format('%.0f', math.ceil(due - now))
end
if #scores > 0 then redis.call('ZADD', KEYS[1], unpack(scores)) end
for trigger, count in pairs(counted) do
  redis.call('HINCRBY', KEYS[2], 'calls\31' .. trigger, count)
end
return table.concat(replies, ' ')
