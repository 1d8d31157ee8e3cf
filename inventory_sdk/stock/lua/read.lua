-- One consistent reading: levels, result records and reservation records, and the journal position they include.
-- KEYS  1 meta  2 available  3 reserved  4 frozen  5 results:0  6 results:1  7 reservations
-- ARGV  1 JSON {fields, operation keys, reservation keys}
-- Reply {epoch or "", sequence, state, JSON {available, reserved, frozen, results, reservations}}: lists with false where there is nothing

local meta = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'state', 'window')
local current, previous = KEYS[5], KEYS[6]
if meta[4] == '1' then current, previous = previous, current end
local asked = cjson.decode(ARGV[1])
local fields, operations, reservations = asked[1], asked[2], asked[3]
local out = {{}, {}, {}, {}, {}}
for i = 1, #fields do
  out[1][i] = redis.call('HGET', KEYS[2], fields[i])
  out[2][i] = redis.call('HGET', KEYS[3], fields[i])
  out[3][i] = redis.call('HGET', KEYS[4], fields[i])
end
for i = 1, #operations do
  out[4][i] = redis.call('HGET', current, operations[i]) or redis.call('HGET', previous, operations[i])
end
for i = 1, #reservations do
  out[5][i] = redis.call('HGET', KEYS[7], reservations[i]) or redis.call('HGET', current, reservations[i] .. '\31')
    or redis.call('HGET', previous, reservations[i] .. '\31')
end
return {meta[1] or '', meta[2] or '0', meta[3] or '', cjson.encode(out)}
