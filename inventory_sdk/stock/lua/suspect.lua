-- A process has seen what can't be true of one history: close the partition until the worker has recovered it.
-- KEYS  1 meta
-- ARGV  1 the epoch in which it was seen  2 why: "went_back", "fork"  3 the highest sequence that the process has seen
-- Reply 1 when it is closed now for this, 0 when it was not open at this epoch any more

local meta = redis.call('HMGET', KEYS[1], 'epoch', 'state')
if meta[1] ~= ARGV[1] or meta[2] ~= 'open' then return 0 end
local t = redis.call('TIME')
redis.call('HSET', KEYS[1], 'state', 'suspect', 'why', ARGV[2], 'seen', ARGV[3],
  'frozen_at', string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000)))
return 1
