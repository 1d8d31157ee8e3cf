-- Stock that changes hands between Redis and the database, step by step. Each step checks first and then writes, all of it or nothing.
-- KEYS  1 meta  2 available  3 reserved  4 frozen  5 admission  6 reservations  7 expiry  8 results:0  9 results:1
-- ARGV  1 epoch  2 not_after (ms)  3 what  4 JSON list  5 JSON [field, fence, ...]: with "holds", "results", "forget": none of these sells yet
--       mark    [field, fence, ...]                       takes and closes are refused from now on: frozen = "w<fence>[ <what stood there>]"
--       unmark  [field, fence, ...]                       they sell on as they were
--       holds   [reservation key, record or "", due ms or 0, ...]     "": it is not here any more, unless its stock sells here
--       results [key, record, ...]
--       forget  [key, position, ...]                      the record of exactly this position
--       admit   [field, fence, available, reserved, ...]  they sell from now on; what sells already under this fence is left as it is
--       reopen  [field]                                   not frozen any more, unless it is marked
-- Reply {1, sequence}, or {0, ...} when the partition is not open at this epoch or it is too late, {-1, field} when it was overtaken
--
-- `admission` remembers each field's last turn, 2 * fence when it came and 2 * fence + 1 when it was marked. The fence is the ledger's
-- and rises with every flip, so a script that comes late, from a process that has died, finds a later turn and changes nothing.

local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'state', 'seq', 'window')
if meta[1] ~= ARGV[1] or meta[2] ~= 'open' or now > tonumber(ARGV[2]) then return {0, '0'} end
local current, previous = KEYS[8], KEYS[9]
if meta[4] == '1' then current, previous = previous, current end
local what, list, guard = ARGV[3], cjson.decode(ARGV[4]), cjson.decode(ARGV[5])
local function int(n) return string.format('%.0f', n) end
local function turn(field) return tonumber(redis.call('HGET', KEYS[5], field) or '-1') end

for i = 1, #guard, 2 do
  if turn(guard[i]) >= 2 * guard[i + 1] then return {-1, guard[i]} end
end

if what == 'mark' or what == 'unmark' or what == 'admit' then
  local step = what == 'admit' and 4 or 2
  local mine = what == 'mark' and 1 or 0
  for i = 1, #list, step do
    if turn(list[i]) > 2 * list[i + 1] + mine then return {-1, list[i]} end
  end
  for i = 1, #list, step do
    local field, fence = list[i], list[i + 1]
    local mark = redis.call('HGET', KEYS[4], field) or ''
    local marked = string.sub(mark, 1, 1) == 'w'
    if what == 'mark' then
      if not marked then
        redis.call('HSET', KEYS[4], field, 'w' .. int(fence) .. (mark ~= '' and ' ' .. mark or ''))
      end
    elseif what == 'unmark' then
      local before = string.match(mark, '^w%d+ (.+)$')
      if marked and before then redis.call('HSET', KEYS[4], field, before) end
      if marked and not before then redis.call('HDEL', KEYS[4], field) end
    elseif turn(field) < 2 * fence then
      redis.call('HSET', KEYS[2], field, int(list[i + 2]))
      redis.call('HSET', KEYS[3], field, int(list[i + 3]))
      redis.call('HDEL', KEYS[4], field)
    end
    redis.call('HSET', KEYS[5], field, int(2 * fence + mine))
  end
elseif what == 'holds' then
  local function sells(key)
    local at = 0
    for part in string.gmatch((redis.call('HGET', KEYS[6], key) or '') .. '\30', '([^\30]*)\30') do
      at = at + 1
      if at > 5 and at % 2 == 0 and string.sub(redis.call('HGET', KEYS[4], part) or '', 1, 1) ~= 'w' then return true end
    end
    return false
  end
  for i = 1, #list, 3 do
    if list[i + 1] == '' then
      -- One whose stock has come back meanwhile is that stock's again.
      if not sells(list[i]) then
        redis.call('HDEL', KEYS[6], list[i])
        redis.call('ZREM', KEYS[7], list[i])
      end
    else
      redis.call('HSET', KEYS[6], list[i], list[i + 1])
      redis.call('HDEL', current, list[i] .. '\31')
      redis.call('HDEL', previous, list[i] .. '\31')
      if list[i + 2] > 0 then redis.call('ZADD', KEYS[7], int(list[i + 2]), list[i]) else redis.call('ZREM', KEYS[7], list[i]) end
    end
  end
elseif what == 'results' then
  for i = 1, #list, 2 do redis.call('HSET', current, list[i], list[i + 1]) end
elseif what == 'forget' then
  local function forget(key, name, position)
    local record = redis.call('HGET', key, name)
    if record and string.match(record, '^[^\30]*\30([^\30]*)') == position then redis.call('HDEL', key, name) end
  end
  for i = 1, #list, 2 do
    forget(current, list[i], list[i + 1])
    forget(previous, list[i], list[i + 1])
  end
elseif what == 'reopen' then
  local mark = redis.call('HGET', KEYS[4], list[1]) or ''
  if string.sub(mark, 1, 1) == 'w' then return {-1, list[1]} end
  redis.call('HDEL', KEYS[4], list[1])
end
return {1, meta[3] or '0'}
