-- Close a partition and give it a new epoch. The only script that creates `meta`.
-- KEYS  1 meta
-- ARGV  1 the new epoch
-- Reply 1 when this epoch is now the frozen one (also when it was already), 0 when a newer one stands, or this one is past it

local epoch = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '-1')
local new = tonumber(ARGV[1])
if epoch > new then return 0 end
if epoch == new then
  return redis.call('HGET', KEYS[1], 'state') == 'frozen' and 1 or 0
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'seq', '0', 'state', 'frozen', 'run_id', '', 'chunk', '0')
return 1
