-- Note that keys are to be calculated (again). Repeating it is harmless: at the worst there is one run more.
--
-- KEYS[1]    due: sorted set, key → the time (ms) at which somebody should look at it
-- KEYS[2]    counts: hash of the function (versions, fences, what its triggers did)
-- KEYS[3]    claims: list of the last ones, the newest first (see claim.lua)
-- KEYS[4..]  state: one hash per key
-- ARGV[1]    debounce, ms: a key rests that long after its last request …
-- ARGV[2]    max_wait, ms: … but no longer than this after the first one that waits
-- ARGV[3]    the newest fence that the caller knows
-- ARGV[4]    how many triggers called; then by turns their names and how often, over all keys
-- ARGV[..]   six per key: key, arguments (JSON), kind ("1": somebody waits for the outcome, "0": nobody does, "-" and a version: the
--            request of that version covers its calls; once a run has answered that, they are only counted), its calls, first
--            trigger, ms since the last call
-- Replies {in one string (a client parses it the quickest) the fence, the version of the first key (the others' follow), and per key
-- the ms until it is due (-1: once the run that is on has ended; -2: nothing waits), with a "!" where no call puts that off any more;
-- what was claimed after the fence that the caller knows, as in claims}
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
local first_version = redis.call('HINCRBY', KEYS[2], 'version', #KEYS - 3) - (#KEYS - 4)
local fence = tonumber(redis.call('HGET', KEYS[2], 'fence') or 0)
local at = 5
for _ = 1, tonumber(ARGV[4]) do
  redis.call('HINCRBY', KEYS[2], 'calls\31' .. ARGV[at], ARGV[at + 1])
  at = at + 2
end
local replies, scores = {string.format('%.0f', fence), string.format('%.0f', first_version)}, {}
for n = 4, #KEYS do
  local key, arguments, kind, calls, opener = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local called = now - tonumber(ARGV[at + 5])
  at = at + 6
  local version = string.format('%.0f', first_version + n - 4)
  local state = redis.call('HMGET', KEYS[n], 'asked', 'done', 'running', 'first', 'calls', 'wanted', 'rest', 'last',
    'due')
  local running = state[3]
  local waits = tonumber(state[1] or 0) > tonumber(running or state[2] or 0)
  local covering = string.match(kind, '^%-(%d+)$')
  if waits or not covering or tonumber(running or state[2] or 0) < tonumber(covering) then
    local wanted = kind == '1' and '1' or '0'
    local first = now
    if waits then
      -- One that waits already: who was the first stays, and a key is never due earlier than somebody was told.
      first = tonumber(state[4])
      called = math.max(called, tonumber(state[8]))
      calls = state[5] .. calls
      if #calls - (string.find(calls, '\29', 1, true) or 0) > TAIL then calls = added_up(calls) end
      if state[6] == '1' then wanted = '1' end
    end
    local due = math.max(math.min(called + debounce, first + longest), tonumber(state[7] or 0))
    if waits and not running then due = math.max(due, tonumber(state[9] or 0)) end
    redis.call('HSET', KEYS[n], 'asked', version, 'last', string.format('%.0f', called), 'arguments', arguments, 'calls', calls,
      'wanted', wanted, 'due', string.format('%.0f', due))
    if not waits then
      redis.call('HSET', KEYS[n], 'first', stamp, 'opener', opener)
      redis.call('PERSIST', KEYS[n])  -- one that waits lives until it has been answered
    end
    if running then
      replies[#replies + 1] = '-1'
    else
      scores[#scores + 1] = string.format('%.0f', due)
      scores[#scores + 1] = key
      local fixed = debounce == 0 or due >= first + longest
      replies[#replies + 1] = string.format('%.0f', math.max(0, math.ceil(due - now))) .. (fixed and '!' or '')
    end
  else
    replies[#replies + 1] = '-2'
  end
end
if #scores > 0 then redis.call('ZADD', KEYS[1], unpack(scores)) end
local claimed = fence > tonumber(ARGV[3]) and redis.call('LRANGE', KEYS[3], 0, fence - tonumber(ARGV[3]) - 1) or {}
return {table.concat(replies, ' '), claimed}
