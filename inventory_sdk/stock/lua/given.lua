-- Entries that gave stock back and that nobody can lose any more leave `givers`.
-- KEYS  1 meta  2 givers
-- ARGV  1 epoch  2 run_id as known  3 every sequence up to this one is applied  4 JSON [field, ...] to look at
--       5 JSON [sequence, ...] that the queue has confirmed
-- Reply: fields that have left

local meta = redis.call('HMGET', KEYS[1], 'epoch', 'run_id')
if meta[1] ~= ARGV[1] or meta[2] ~= ARGV[2] then return 0 end
local info = redis.pcall('INFO', 'server')
local run_id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
if run_id ~= ARGV[2] then return 0 end

local applied, confirmed, left = tonumber(ARGV[3]), {}, 0
for _, sequence in ipairs(cjson.decode(ARGV[5])) do confirmed[tonumber(sequence)] = true end
for _, field in ipairs(cjson.decode(ARGV[4])) do
  local known = redis.call('HGET', KEYS[2], field)
  if known then
    local kept = {}
    if string.sub(known, 1, 1) == '*' then
      -- Which ones they were is forgotten, so only the ledger can vouch for all.
      if tonumber(string.sub(known, 2)) > applied then kept[1] = known end
    else
      for text in string.gmatch(known, '%d+') do
        local sequence = tonumber(text)
        if sequence > applied and not confirmed[sequence] then kept[#kept + 1] = text end
      end
    end
    if #kept == 0 then
      redis.call('HDEL', KEYS[2], field)
      left = left + 1
    else
      local text = table.concat(kept, ',')
      if text ~= known then redis.call('HSET', KEYS[2], field, text) end
    end
  end
end
return left
