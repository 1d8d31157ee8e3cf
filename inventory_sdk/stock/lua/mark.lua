-- Something harmless written behind operations that stand here, for who waits on this connection until copies have it.
-- KEYS  1 meta  2 results:0  3 results:1  4 reservations
-- ARGV  1 epoch  2 run_id as known  3 JSON [operation key, position, ...]
-- Reply {"ok" or why nothing was written, 1 or 0 for each: the operation of this key stands here with this position}

local meta = redis.call('HMGET', KEYS[1], 'epoch', 'state', 'run_id')
if meta[1] ~= ARGV[1] then return {'epoch'} end
if meta[2] ~= 'open' then return {'state'} end
local info = redis.pcall('INFO', 'server')
local run_id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
if run_id ~= meta[3] or run_id ~= ARGV[2] then return {'run_id'} end

-- A result and a reservation both have the position second.
local function at(record) return record and string.match(record, '^[^\30]*\30([^\30]*)') end

local asked, reply = cjson.decode(ARGV[3]), {'ok'}
for i = 1, #asked, 2 do
  local key, position = asked[i], asked[i + 1]
  local stands = at(redis.call('HGET', KEYS[2], key)) == position or at(redis.call('HGET', KEYS[3], key)) == position
    or at(redis.call('HGET', KEYS[4], key)) == position
  reply[#reply + 1] = stands and 1 or 0
end
redis.call('HINCRBY', KEYS[1], 'mark', 1)
return reply
