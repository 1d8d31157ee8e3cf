-- Stock fields from ledger rows, only where absent, and the live holds on them. The ledger rows are held FOR SHARE until this answers.
-- KEYS  1 meta  2 available  3 reserved  4 reservations  5 expiry  6 results:0  7 results:1
-- ARGV  1 epoch  2 not_after (ms)  3 JSON [field, available, reserved, ...]  4 JSON [reservation key, record, due ms or 0, ...]
-- Reply 1, or 0 when the partition is not open at this epoch, or it is too late
--
-- A hold gets the lines of the fields that come just now. The others it has already, and the ledger may be behind on those.

local RS = '\30'
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'state', 'window')
if meta[1] ~= ARGV[1] or meta[2] ~= 'open' or now > tonumber(ARGV[2]) then return 0 end
local current, previous = KEYS[6], KEYS[7]
if meta[3] == '1' then current, previous = previous, current end

local list, new = cjson.decode(ARGV[3]), {}
for i = 1, #list, 3 do
  if redis.call('HSETNX', KEYS[2], list[i], string.format('%.0f', list[i + 1])) == 1 then
    redis.call('HSET', KEYS[3], list[i], string.format('%.0f', list[i + 2]))
    new[list[i]] = true
  end
end

local function split(text)
  local parts = {}
  for part in string.gmatch(text .. RS, '([^' .. RS .. ']*)' .. RS) do parts[#parts + 1] = part end
  return parts
end

local holds = cjson.decode(ARGV[4])
for i = 1, #holds, 3 do
  local key, closed = holds[i], holds[i] .. '\31'
  local given, added = split(holds[i + 1]), {}
  for j = 6, #given, 2 do
    if new[given[j]] then
      added[#added + 1] = given[j]
      added[#added + 1] = given[j + 1]
    end
  end
  if #added > 0 then
    local there = redis.call('HGET', KEYS[4], key)
    -- Closed before these lines were known: it is open again by what they hold.
    local before = there or redis.call('HGET', current, closed) or redis.call('HGET', previous, closed)
    local record = before and split(before) or {given[1], given[2], given[3], given[4], given[5]}
    -- "" stands for the fingerprint of its only line, which is not its only one any more.
    if before then record[3] = given[3] end
    if not there then record[1] = given[1] end
    for j = 1, #added do record[#record + 1] = added[j] end
    redis.call('HSET', KEYS[4], key, table.concat(record, RS))
    redis.call('HDEL', current, closed)
    redis.call('HDEL', previous, closed)
    if not there and holds[i + 2] > 0 then redis.call('ZADD', KEYS[5], string.format('%.0f', holds[i + 2]), key) end
  end
end
return 1
