-- Replace a link's rules if they are still the version that the caller has seen, and say so in the history and to whoever listens.
--
-- KEYS  1 rules (hash: link -> document)   2 history of the link (list, newest first)
-- ARGV  1 link   2 version seen (0: none)   3 new document, of a higher version   4 entry of the history, without its time
--       5 entries to keep   6 channel
-- Reply {1, Redis milliseconds} done; {0, document that is there, or ''} seen another version
local current = redis.call('HGET', KEYS[1], ARGV[1])
local version = 0
if current then
    version = cjson.decode(current).version
end
if version ~= tonumber(ARGV[2]) then
    return {0, current or ''}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('LPUSH', KEYS[2], '{"at_ms":' .. string.format('%d', now) .. ',' .. string.sub(ARGV[4], 2))
redis.call('LTRIM', KEYS[2], 0, ARGV[5] - 1)
redis.call('PUBLISH', ARGV[6], ARGV[3])
return {1, now}
