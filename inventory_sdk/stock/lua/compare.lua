-- One consistent reading of many counters, for the comparison with the ledger: three bulk commands, however many fields.
-- KEYS  1 meta  2 available  3 reserved
-- ARGV  1... fields
-- Reply {epoch or "", sequence, state ("run_id": open, but on another server process), fields in available, {available}, {reserved}}

local meta = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'state', 'run_id')
local state = meta[3] or ''
local info = redis.pcall('INFO', 'server')
local run_id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
if state == 'open' and run_id ~= meta[4] then state = 'run_id' end
local out = {meta[1] or '', meta[2] or '0', state, redis.call('HLEN', KEYS[2]), {}, {}}
if #ARGV > 0 then
  out[5] = redis.call('HMGET', KEYS[2], unpack(ARGV))
  out[6] = redis.call('HMGET', KEYS[3], unpack(ARGV))
end
return out
