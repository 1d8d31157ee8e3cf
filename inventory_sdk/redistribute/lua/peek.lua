-- What is due, and when the next key will be.
--
-- KEYS[1]  due
-- ARGV[1]  how many keys at the most
-- Replies: {keys that are due, the longest overdue first}, ms until the next one is due (-1: there is none)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local at = string.format('%.0f', now)
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', at, 'LIMIT', 0, ARGV[1])
local later = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. at, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
if #later == 0 then return {due, -1} end
return {due, math.ceil(tonumber(later[2]) - now)}
