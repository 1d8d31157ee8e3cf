-- A lease that one of many has: taken if nobody has it, kept while one has it, given back by who has it.
-- KEYS  1 the lease
-- ARGV  1 whose  2 what: "take", "keep", "give"  3 ms that it lasts
-- Reply 1, or 0 when it is somebody else's (or, for keep and give, nobody's)

local holder = redis.call('GET', KEYS[1])
if ARGV[2] == 'take' and not holder or ARGV[2] ~= 'give' and holder == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
  return 1
end
if holder ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
return 1
