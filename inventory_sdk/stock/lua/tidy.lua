-- Housekeeping of one partition: trim the journal, turn the results windows. In this order: trimming needs no memory, and a Redis
-- that is full must get out of that by itself.
-- KEYS  1 meta  2 results:0  3 results:1  4 journal
-- ARGV  1 epoch  2 window length (ms)  3 most results in one window  4 trim entries up to and including this sequence
--       5 that are older than this (ms)  6 of whatever age while the journal has more entries than this (0: never), or while
--       nine tenths of Redis' maxmemory are used
-- Reply {1 when the windows turned, entries trimmed}

local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'window', 'rotated', 'applied')
if meta[1] ~= ARGV[1] then return {0, 0} end
-- Entries of an epoch follow each other without gaps and carry Redis' time in their body: search for the youngest old enough.
local upto, keep = tonumber(ARGV[4]), now - tonumber(ARGV[5])
local most = tonumber(ARGV[6])
local info = redis.pcall('INFO', 'memory')
if type(info) == 'string' then
  local limit = tonumber(string.match(info, 'maxmemory:(%d+)')) or 0
  if limit > 0 and tonumber(string.match(info, 'used_memory:(%d+)')) > limit * 0.9 then most = 1 end
end
-- Applied entries are kept for a ledger that goes back in time; room for the next sales comes first.
if most > 0 and redis.call('XLEN', KEYS[4]) > most then keep = now end
local function at(sequence)
  local id = meta[1] .. '-' .. string.format('%.0f', sequence)
  local found = redis.call('XRANGE', KEYS[4], id, id)
  return found[1] and tonumber(string.match(string.sub(found[1][2][2], 1, 120), '"t":(%d+)'))
end
local first = redis.call('XRANGE', KEYS[4], meta[1] .. '-0', meta[1] .. '-18446744073709551615', 'COUNT', 1)
local trimmed = 0
if first[1] then
  local low = tonumber(string.match(first[1][1], '%-(%d+)$'))
  local high, last = upto, nil
  while low <= high do
    local middle = math.floor((low + high) / 2)
    local time = at(middle)
    if time and time <= keep then
      last, low = middle, middle + 1
    else
      high = middle - 1
    end
  end
  if last then trimmed = redis.call('XTRIM', KEYS[4], 'MINID', meta[1] .. '-' .. string.format('%.0f', last + 1)) end
end
-- Kept for a ledger that goes back: it may forget what it has applied, this must not.
if upto > tonumber(meta[4] or '0') then redis.call('HSET', KEYS[1], 'applied', ARGV[4]) end
local turned = 0
local current, previous, other = KEYS[2], KEYS[3], '1'
if meta[2] == '1' then current, previous, other = KEYS[3], KEYS[2], '0' end
if now - tonumber(meta[3] or '0') >= tonumber(ARGV[2]) or redis.call('HLEN', current) >= tonumber(ARGV[3]) then
  redis.call('HSET', KEYS[1], 'window', other, 'rotated', string.format('%.0f', now))
  redis.call('UNLINK', previous)
  turned = 1
end
return {turned, trimmed}
