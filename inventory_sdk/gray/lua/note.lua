-- Add to a link's history, once for each version of its rules and name of the note, what was found without changing anything.
--
-- KEYS  1 history of the link (list, newest first)   2 noted (hash: name -> version)
-- ARGV  1 name   2 version   3 entry without its time   4 entries to keep
-- Reply 1 noted; 0 it was there
if redis.call('HGET', KEYS[2], ARGV[1]) == ARGV[2] then
    return 0
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('LPUSH', KEYS[1], '{"at_ms":' .. string.format('%d', now) .. ',' .. string.sub(ARGV[3], 2))
redis.call('LTRIM', KEYS[1], 0, ARGV[4] - 1)
return 1
