-- Note that keys are to be calculated (again). Repeating it is harmless: at the worst there is one run more.
--
-- KEYS[1]    due: sorted set, key → the time (ms) at which somebody should look at it
-- KEYS[2]    counts: hash of the function (versions, fences, what its triggers did)
-- KEYS[3..]  state: one hash per key
-- ARGV[1]    debounce, ms: a key rests that long after its last request …
-- ARGV[2]    max_wait, ms: … but no longer than this after the first one that waits
-- ARGV[3]    how many triggers called; then by turns their names and how often, over all keys
-- ARGV[..]   five per key: key, arguments (JSON), wanted ("1": somebody waits for the outcome), its calls, first trigger
-- Replies, in one string (a client parses it the quickest): the version of the first key (the others' follow), then per key the ms
-- until it is due (-1: it is being calculated, and is due once that has ended)
--
-- Calls by trigger are a string, (name \31 count \30)*: each request adds to its end, whoever reads it adds up. All of a server waits
-- while this runs, and most of its time went into reading and writing JSON.
local TAIL = 1024

local function added_up(calls)
  local names, sums = {}, {}
  for name, count in string.gmatch(calls, '([^\29\30\31]+)\31(%d+)\30') do
    if not sums[name] then names[#names + 1] = name end
    sums[name] = (sums[name] or 0) + count
  end
  for n, name in ipairs(names) do
    names[n] = name .. '\31' .. string.format('%.0f', sums[name]) .. '\30'
  end
  return table.concat(names) .. '\29'  -- what follows was not added up yet
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local stamp = string.format('%.0f', now)
local debounce, longest = tonumber(ARGV[1]), tonumber(ARGV[2])
local first_version = redis.call('HINCRBY', KEYS[2], 'version', #KEYS - 2) - (#KEYS - 3)
local at = 4
for _ = 1, tonumber(ARGV[3]) do
  redis.call('HINCRBY', KEYS[2], 'calls\31' .. ARGV[at], ARGV[at + 1])
  at = at + 2
end
local replies, scores = {string.format('%.0f', first_version)}, {}
for n = 3, #KEYS do
  local key, arguments, wanted, calls, opener = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  at = at + 5
  local version = string.format('%.0f', first_version + n - 3)
  local state = redis.call('HMGET', KEYS[n], 'asked', 'done', 'running', 'first', 'calls', 'wanted', 'rest')
  local running = state[3]
  local first = now
  if tonumber(state[1] or 0) > tonumber(running or state[2] or 0) then
    -- One that waits already: who was the first stays.
    first = tonumber(state[4])
    calls = state[5] .. calls
    if #calls - (string.find(calls, '\29', 1, true) or 0) > TAIL then calls = added_up(calls) end
    if state[6] == '1' then wanted = '1' end
    redis.call('HSET', KEYS[n], 'asked', version, 'last', stamp, 'arguments', arguments, 'calls', calls, 'wanted', wanted)
  else
    redis.call('HSET', KEYS[n], 'asked', version, 'last', stamp, 'arguments', arguments, 'calls', calls, 'wanted', wanted,
      'first', stamp, 'opener', opener)
    redis.call('PERSIST', KEYS[n])  -- one that waits lives until it has been answered
  end
  if running then
    replies[#replies + 1] = '-1'
  else
    local due = math.max(math.min(now + debounce, first + longest), tonumber(state[7] or 0))
    scores[#scores + 1] = string.format('%.0f', due)
    scores[#scores + 1] = key
    replies[#replies + 1] = string.format('%.0f', math.ceil(due - now))
  end
end
if #scores > 0 then redis.call('ZADD', KEYS[1], unpack(scores)) end
return table.concat(replies, ' ')
