-- Stock fields from ledger rows, only where absent. The ledger rows are held FOR SHARE until this answers.
-- KEYS  1 meta  2 available  3 reserved
-- ARGV  1 epoch  2 not_after (ms)  3 JSON [field, available, reserved, ...]
-- Reply 1, or 0 when the partition is not open at this epoch, or it is too late

local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'state')
if meta[1] ~= ARGV[1] or meta[2] ~= 'open' or now > tonumber(ARGV[2]) then return 0 end
local list = cjson.decode(ARGV[3])
for i = 1, #list, 3 do
  if redis.call('HSETNX', KEYS[2], list[i], string.format('%.0f', list[i + 1])) == 1 then
    redis.call('HSET', KEYS[3], list[i], string.format('%.0f', list[i + 2]))
  end
end
return 1
