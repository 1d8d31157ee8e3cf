-- What is due and not being calculated: while somebody calculates a key, it is due when his lease ends.
--
-- KEYS[1]  due
-- Replies: {keys that are due, ms since the first of them is}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if #first == 0 then return {0, 0} end
return {redis.call('ZCOUNT', KEYS[1], '-inf', string.format('%.0f', now)), math.max(0, math.floor(now - tonumber(first[2])))}
