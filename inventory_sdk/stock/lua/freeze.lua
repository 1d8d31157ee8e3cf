-- Close a partition and give it a new epoch. The only script that creates `meta`.
-- KEYS  1 meta
-- ARGV  1 the new epoch
-- Reply 1 when this epoch is now the frozen one (also when it was already), 0 when a newer one stands, or this one is past it
--
-- `frozen_at` is when it stopped selling: a recovery that follows an unfinished one keeps the first one's.

local meta = redis.call('HMGET', KEYS[1], 'epoch', 'state', 'frozen_at')
local epoch = tonumber(meta[1] or '-1')
local new = tonumber(ARGV[1])
if epoch > new then return 0 end
if epoch == new then return meta[2] == 'frozen' and 1 or 0 end
local t = redis.call('TIME')
local frozen_at = string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000))
if meta[2] and meta[2] ~= 'open' and meta[3] then frozen_at = meta[3] end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'seq', '0', 'state', 'frozen', 'run_id', '', 'chunk', '0', 'frozen_at', frozen_at,
  'applied', '0', 'older', '')
redis.call('HDEL', KEYS[1], 'why', 'seen')
return 1
