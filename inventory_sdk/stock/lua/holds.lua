-- One consistent reading of reservations and of when they end, for the comparison.
-- KEYS  1 meta  2 reservations  3 expiry
-- ARGV  1... reservation keys
-- Reply {epoch or "", sequence, state ("run_id": open, but on another server process), now ms, {record}, {when it ends, ms}}

local t = redis.call('TIME')
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'state', 'run_id')
local state = meta[3] or ''
local info = redis.pcall('INFO', 'server')
local run_id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
if state == 'open' and run_id ~= meta[4] then state = 'run_id' end
local due = {}
for i = 1, #ARGV do due[i] = redis.call('ZSCORE', KEYS[3], ARGV[i]) end
local records = {}
if #ARGV > 0 then records = redis.call('HMGET', KEYS[2], unpack(ARGV)) end
return {meta[1] or '', meta[2] or '0', state, string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000)), records, due}
