-- Which requests are not there any more: what was claimed since the caller has seen the board.
--
-- KEYS[1]  counts
-- KEYS[2]  claims: list of the last ones, the newest first (see claim.lua)
-- ARGV[1]  the newest fence that the caller knows
-- Replies {fence, version, what was claimed after the fence that the caller knows, as in claims}
local counts = redis.call('HMGET', KEYS[1], 'fence', 'version')
local fence, known = tonumber(counts[1] or 0), tonumber(ARGV[1])
local claimed = fence > known and redis.call('LRANGE', KEYS[2], 0, fence - known - 1) or {}
return {fence, tonumber(counts[2] or 0), claimed}
