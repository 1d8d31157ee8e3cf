-- Remember merchants whom the percentage has reached, in the order of their coming. None is ever removed, so whoever knows the first n
-- asks for those from rank n on.
--
-- KEYS  1 exposed (sorted set: merchant -> number of its coming)
-- ARGV  merchants
-- Reply how many there are now
local count = redis.call('ZCARD', KEYS[1])
for _, merchant in ipairs(ARGV) do
    count = count + redis.call('ZADD', KEYS[1], 'NX', count + 1, merchant)
end
return count
