-- One fenced chunk of a rebuild. Chunk 1 empties the partition (not the journal); "open" opens it; "older" comes behind that.
-- KEYS  1 meta  2 available  3 reserved  4 frozen  5 results:0  6 results:1  7 reservations  8 expiry  9 givers
-- ARGV  1 epoch  2 chunk number (1, 2, ...)  3 what: "begin", "balances", "reservations", "results", "open", "older"  4 JSON list
--         balances: [field, available, reserved, ...]   reservations: [key, record, due ms or 0, ...]   results: [key, record, ...]
--         open: [where "older" begins, the layout]   older: [where this one begins, where the next one begins, key, record, ...]
-- Reply 1, or 0 when another epoch, state or chunk stands there: somebody else is rebuilding

local meta = redis.call('HMGET', KEYS[1], 'epoch', 'state', 'chunk', 'older', 'window')
if meta[1] ~= ARGV[1] then return 0 end
local what = ARGV[3]
if what == 'older' then
  -- Each is written once, whoever restores: written again, it could bring back the answer of a take that was undone since.
  local list = cjson.decode(ARGV[4])
  if meta[2] ~= 'open' or (meta[4] or '') ~= list[1] then return 0 end
  local current, previous = KEYS[5], KEYS[6]
  if meta[5] == '1' then current, previous = previous, current end
  for i = 3, #list, 2 do
    -- Old ones belong to the window that is dropped first; what happened since the opening stands.
    if redis.call('HEXISTS', current, list[i]) == 0 then redis.call('HSETNX', previous, list[i], list[i + 1]) end
  end
  redis.call('HSET', KEYS[1], 'older', list[2])
  return 1
end
if tonumber(meta[3]) ~= tonumber(ARGV[2]) - 1 then return 0 end
if what == 'begin' then
  if meta[2] ~= 'frozen' then return 0 end
  redis.call('UNLINK', KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9])
  local t = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'state', 'rebuilding', 'chunk', ARGV[2], 'window', '0',
    'rotated', string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000)))
  return 1
end
if meta[2] ~= 'rebuilding' then return 0 end
local list = cjson.decode(ARGV[4])
local function int(n) return string.format('%.0f', n) end
local function write(command, key, values)
  for from = 1, #values, 4000 do
    redis.call(command, key, unpack(values, from, math.min(from + 3999, #values)))
  end
end
if what == 'balances' then
  local available, reserved = {}, {}
  for i = 1, #list, 3 do
    available[#available + 1], available[#available + 2] = list[i], int(list[i + 1])
    reserved[#reserved + 1], reserved[#reserved + 2] = list[i], int(list[i + 2])
  end
  write('HSET', KEYS[2], available)
  write('HSET', KEYS[3], reserved)
elseif what == 'reservations' then
  local records, due = {}, {}
  for i = 1, #list, 3 do
    records[#records + 1], records[#records + 2] = list[i], list[i + 1]
    if list[i + 2] > 0 then due[#due + 1], due[#due + 2] = int(list[i + 2]), list[i] end
  end
  write('HSET', KEYS[7], records)
  write('ZADD', KEYS[8], due)
elseif what == 'results' then
  for i = 1, #list, 2 do redis.call('HSETNX', KEYS[5], list[i], list[i + 1]) end
elseif what == 'open' then
  local info = redis.pcall('INFO', 'server')
  local run_id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
  redis.call('HSET', KEYS[1], 'state', 'open', 'run_id', run_id, 'chunk', ARGV[2], 'older', list[1] or '', 'layout', list[2] or '')
  return 1
end
redis.call('HSET', KEYS[1], 'chunk', ARGV[2])
return 1
