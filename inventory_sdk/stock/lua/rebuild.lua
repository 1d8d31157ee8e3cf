-- One fenced chunk of a rebuild. Chunk 1 empties the partition (not the journal); the last one opens it.
-- KEYS  1 meta  2 available  3 reserved  4 frozen  5 results:0  6 results:1  7 reservations  8 expiry  9 givers
-- ARGV  1 epoch  2 chunk number (1, 2, ...)  3 what: "begin", "balances", "reservations", "results", "open"  4 JSON list
--         balances: [field, available, reserved, ...]   reservations: [key, record, due ms or 0, ...]   results: [key, record, ...]
-- Reply 1, or 0 when another epoch, state or chunk stands there: somebody else is rebuilding

local meta = redis.call('HMGET', KEYS[1], 'epoch', 'state', 'chunk')
if meta[1] ~= ARGV[1] or tonumber(meta[3]) ~= tonumber(ARGV[2]) - 1 then return 0 end
local what = ARGV[3]
if what == 'begin' then
  if meta[2] ~= 'frozen' then return 0 end
  redis.call('DEL', KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9])
  local t = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'state', 'rebuilding', 'chunk', ARGV[2], 'window', '0',
    'rotated', string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000)))
  return 1
end
if meta[2] ~= 'rebuilding' then return 0 end
local list = cjson.decode(ARGV[4])
local function int(n) return string.format('%.0f', n) end
if what == 'balances' then
  for i = 1, #list, 3 do
    redis.call('HSET', KEYS[2], list[i], int(list[i + 1]))
    redis.call('HSET', KEYS[3], list[i], int(list[i + 2]))
  end
elseif what == 'reservations' then
  for i = 1, #list, 3 do
    redis.call('HSET', KEYS[7], list[i], list[i + 1])
    if list[i + 2] > 0 then redis.call('ZADD', KEYS[8], int(list[i + 2]), list[i]) end
  end
elseif what == 'results' then
  for i = 1, #list, 2 do redis.call('HSETNX', KEYS[5], list[i], list[i + 1]) end
elseif what == 'open' then
  local info = redis.pcall('INFO', 'server')
  local run_id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
  redis.call('HSET', KEYS[1], 'state', 'open', 'run_id', run_id, 'chunk', ARGV[2])
  return 1
end
redis.call('HSET', KEYS[1], 'chunk', ARGV[2])
return 1
