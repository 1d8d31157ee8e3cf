-- One batch of operations on one partition: all checked, journaled as one entry, then moved.
--
-- KEYS  1 meta  2 available  3 reserved  4 frozen  5 results:0  6 results:1  7 reservations  8 expiry  9 givers  10 journal
-- ARGV  1 epoch  2 run_id as known ("" on a server that can't tell)  3 not_after (ms)  4 nonce  5 journal cap (entries, 0: none)
--       6 "1": there is a queue that confirms: answer the journal entry's body, keep `givers`
--       7 JSON [[kind, key, fingerprint, lines, order, reference, ttl ms, extra, mark, flag], ...]; lines is flat: field, quantity, ...
--         undo and keep: reference = key of the take, mark = its position; undo: flag = kind of the take, ttl ms = 1: spoken by
--         the hold's decider
--         pin: ttl ms = 1: the decider's commit confirms; else what a resume gives it (0: until closed); mark = ms until overdue
--         void, correct: lines in threes: field, available delta, reserved delta
--         void: flag "f" freezes the SKUs, reference = reservation to close
--         correct: flag "l": the ledger is what was wrong. It writes off (an adjust beside the correct), and Redis stays as it is
--         credit: reference = key of the operation that entered through the ledger
--         credit and void: mark = the epoch in which the ledger owes it, or a position of that epoch
--         keep: flag = a field of the take
--         Calls over several partitions (docs/explanation/spanning.md). A line of another partition is \29 partition \29 field: it is
--         kept in records and answered, and moves nothing here.
--         reserve with flag "p": a part, born pinned; ttl ms = what a commit does (0 hold on, 1 sell, 2 write off), mark = ms until overdue
--         reserve, deduct, adjust with 11 and 12: the decision of a call; 11 = its parts [[partition, position], ...], 12 = per line
--         what remained there (of those elsewhere); flag "k": can't be undone
--         undo of such a call: 11 = [] says that there are lines of other partitions; extra names them
--         claim: reference = the id that an act takes here which is done in another partition, order = the key of the reservation
--         that it closes there; undo and keep of it: reference = key of the claim, that id and \31claim; undo: flag = "claim"
--         abort: reference = key of the call, 11 = parts that a decision must not name any more
--         follow: reference = key of the part, mark = its position, 11 = [field, confirmed, released, expired, ...] to come up to;
--         flag "a": what is confirmed is written off
--         confirm, release: flag may hold "r" reacquire, "t" leave a tombstone, "d" spoken by the hold's decider,
--         "s" made of a journal entry that came late: it remembers its lines; a confirm without its reserve takes them
--         what sells: flag may hold "Q": at durability queue, so it rests on what gave its stock back; "W" and "A" are the client's
--       8... more fields of the journal's entry, by turns name and value: 't' and the traceparent of the batch, where it is traced
--
-- Reply, one string of lines: status, now ms, epoch, sequence, results JSON, body (parsing one string costs a client the least),
-- and only where an operation with "Q" rests on entries that the queue has not confirmed: JSON [field, givers, ...]
--   status "ok", or nothing was executed: "missing" no meta, "state" not open, "epoch", "run_id", "late" after not_after
--   results, one per operation:
--     [0, remaining ...]  done now    [-1, [remaining ...], [field, quantity ...], order]  done now, with what the call did not name
--     [1, record]  seen before: the record of the first    [2]  other content
--     [3, field, asked, available, ...]  short    [4, field, ...]  not loaded    [5, field, ...]  frozen    [6, state]  closed
--     [7]  no such reservation    [8]  journal full    [9, field, asked, open, ...]  more than is open    [10]  pinned
--     [11]  can't be undone or kept any more    [12, expires_at]  not due
--     [30, field, ...]  the database sells it, or is about to (marked in frozen by admit.lua)
--     [14]  a part of it was aborted    [15]  owed in another epoch: a rebuild has included it
--     [13, record]  seen before, and how its reservation ended is not known here (after a rebuild): ask the ledger
--
-- A result record is: fingerprint RS position RS flags RS remaining,...[|partition:position ...] RS order RS lines (field RS quantity ...; only where the call gave none)
-- A reservation record (fingerprint "": that of its only line) is: state RS position RS fingerprint RS expires_at (pinned: the pin's ttl ms) RS order {RS field RS original[/confirmed/released/expired]}
-- givers: field -> sequences of this epoch that gave back stock and are not confirmed, with commas; more than 256: "*" and the last one.
-- RS is \30. Closed reservations live in the results windows under key .. "\31". States: h held, p pinned, c confirmed, r released, x expired.
--
-- Phases: bulk reads, decisions in plain Lua, bulk writes. XADD is the first write: if it fails, nothing has moved.

local RS, SLICE, MOST_GIVERS = '\30', 4000, 256
local call, find, sub, fmt, byte = redis.call, string.find, string.sub, string.format, string.byte
local concat = table.concat
local HELD, PINNED, CONFIRMED, RELEASED, EXPIRED = 'h', 'p', 'c', 'r', 'x'

local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local function int(n) return fmt('%.0f', n) end

-- The partition: open, at this epoch, on the server we know, and not too late.
local meta = call('HMGET', KEYS[1], 'epoch', 'seq', 'state', 'run_id', 'window')
local epoch, seq = meta[1], meta[2]
local function refuse(status) return concat({status, int(now), epoch or '0', seq or '0', '', ''}, '\n') end
if not epoch then return refuse('missing') end
if epoch ~= ARGV[1] then return refuse('epoch') end
if meta[3] ~= 'open' then return refuse('state') end
local info = redis.pcall('INFO', 'server')
local run_id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
if run_id ~= meta[4] or run_id ~= ARGV[2] then return refuse('run_id') end
if now > tonumber(ARGV[3]) then return refuse('late') end
local current, previous = KEYS[5], KEYS[6]
if meta[5] == '1' then current, previous = previous, current end
local position = epoch .. '-' .. int(tonumber(seq) + 1)
local cap = tonumber(ARGV[5])
local full = cap > 0 and call('XLEN', KEYS[10]) >= cap
local any_frozen = call('HLEN', KEYS[4]) > 0
local confirms = ARGV[6] == '1'
local any_givers = confirms and call('HLEN', KEYS[9]) > 0

local ops = cjson.decode(ARGV[7])

local function entry(journal)
  return '{"v":1,"n":"' .. ARGV[4] .. '","t":' .. int(now) .. ',"ops":' .. cjson.encode(journal) .. '}'
end

-- A sale of one line that is alone in its batch, new and covered: the same as below without its tables. All else goes through the phases.
local lone = #ops == 1 and not any_frozen and not any_givers and not full and ops[1]
if lone and lone[1] == 'deduct' and #lone[4] == 2 and not lone[11] then
  local key, line = lone[2], lone[4]
  local there = call('HGET', KEYS[2], line[1])
  local left = there and tonumber(there) - line[2]
  if left and left >= 0 and not call('HGET', current, key) and not call('HGET', previous, key) then
    local body = entry({{'deduct', key, lone[3], line, {left}, lone[5], lone[6], 0, lone[8]}})
    call('XADD', KEYS[10], position, 'b', body, unpack(ARGV, 8))
    seq = int(tonumber(seq) + 1)
    call('HSET', KEYS[1], 'seq', seq)
    call('HSET', KEYS[2], line[1], left)
    local text = lone[3] .. RS .. position .. RS .. RS .. left
    if lone[5] ~= '' then text = text .. RS .. lone[5] end
    call('HSET', current, key, text)
    if not confirms then body = '' end
    return 'ok\n' .. int(now) .. '\n' .. epoch .. '\n' .. seq .. '\n[[0,' .. left .. ']]\n' .. body
  end
end

local IS_TAKE = {reserve = true, deduct = true, adjust = true}
local REMEMBERED = {reserve = true, deduct = true, adjust = true, confirm = true, release = true, credit = true, void = true, correct = true}
local CLOSES = {confirm = true, release = true}
local HOLDS = {confirm = true, release = true, extend = true, expire = true, pin = true, resume = true, void = true, undo = true, keep = true, credit = true, follow = true}

-- Bulk reads ------------------------------------------------------------------------------------------------------------
local function hmget(key, names, into)
  for from = 1, #names, SLICE do
    local upto = math.min(from + SLICE - 1, #names)
    local values = call('HMGET', key, unpack(names, from, upto))
    for i = 1, upto - from + 1 do
      if values[i] then into[names[from + i - 1]] = values[i] end
    end
  end
end

local function split(text)
  local out, n, from = {}, 0, 1
  while true do
    local at = find(text, RS, from, true)
    n = n + 1
    if not at then out[n] = sub(text, from) return out end
    out[n] = sub(text, from, at - 1)
    from = at + 1
  end
end

local function abort_name(key, part) return key .. '\31abort\31' .. part[1] .. '\31' .. part[2] end

local function one_line_mark(field, quantity) return 'r' .. quantity .. ' ' .. field end

local result_names, hold_names, fields, both, only_takes, spanning = {}, {}, {}, {}, true, false
for i = 1, #ops do
  local op = ops[i]
  local kind, key, lines, reference = op[1], op[2], op[4], op[6]
  if REMEMBERED[kind] then result_names[#result_names + 1] = key end
  if kind == 'reserve' then
    result_names[#result_names + 1] = key .. '\31'
    hold_names[#hold_names + 1] = key
  elseif HOLDS[kind] and reference ~= '' then
    hold_names[#hold_names + 1] = reference
    if kind == 'undo' or kind == 'keep' or kind == 'void' or kind == 'credit' then result_names[#result_names + 1] = reference end
  end
  if kind == 'claim' then result_names[#result_names + 1] = reference end
  if kind == 'undo' and op[10] == 'claim' then result_names[#result_names + 1] = sub(reference, 1, -7) end
  if kind == 'keep' and op[10] ~= '' then fields[#fields + 1] = op[10] end
  if not IS_TAKE[kind] then only_takes = false end
  if op[11] then
    spanning = true
    if kind == 'abort' then result_names[#result_names + 1] = reference end
    if kind ~= 'follow' then
      local of = kind == 'abort' and reference or key
      for j = 1, #op[11] do result_names[#result_names + 1] = abort_name(of, op[11][j]) .. '\31' end
    end
  end
  if kind == 'deduct' or kind == 'adjust' then
    for j = 1, #lines, 2 do fields[#fields + 1] = lines[j] end
  else
    local step = (kind == 'void' or kind == 'correct') and 3 or 2
    for j = 1, #lines, step do both[#both + 1] = lines[j] end
  end
end

local results, holds, raw_available, raw_reserved, frozen = {}, {}, {}, {}, {}
if #result_names > 0 then
  hmget(previous, result_names, results)
  hmget(current, result_names, results)
end
if #hold_names > 0 then
  hmget(KEYS[7], hold_names, holds)
  call('ZCARD', KEYS[8])
  call('HLEN', current)  -- a key of another type must fail before the first write
end
for key, text in pairs(holds) do
  local record = split(text)
  if find(text, '\29', 1, true) then spanning = true end
  if record[3] == '' and record[7] then record[3] = one_line_mark(record[6], string.match(record[7], '^%d+')) end
  holds[key] = record
  for j = 6, #record, 2 do both[#both + 1] = record[j] end
end
for i = 1, #both do fields[#fields + 1] = both[i] end
if #fields > 0 then
  hmget(KEYS[2], fields, raw_available)
  if any_frozen then hmget(KEYS[4], fields, frozen) end
end
if #both > 0 then hmget(KEYS[3], both, raw_reserved) end
-- Stock that is leaving for the database bears a mark, "w..." (see admit.lua): nothing that the ledger counts may move it here.
local function leaving(field) return any_frozen and frozen[field] and sub(frozen[field], 1, 1) == 'w' end
local any_leaving = false
for field in pairs(frozen) do
  if leaving(field) then any_leaving = true end
end
local available, reserved = {}, {}
for field, value in pairs(raw_available) do available[field] = tonumber(value) end
for field, value in pairs(raw_reserved) do reserved[field] = tonumber(value) end

-- What the decisions will write ---------------------------------------------------------------------------------------------
local new_available, new_reserved, new_results, new_holds, new_expiry, new_frozen = {}, {}, {}, {}, {}, {}
local gave, rests = {}, {}
local journal, answers = {}, {}

local function closed_record(key)
  local name = key .. '\31'
  local text = results[name]
  if text == nil and new_results[name] == nil then
    text = call('HGET', current, name) or call('HGET', previous, name)
  end
  return text and split(text) or nil
end

local function move(field, da, dr)
  if spanning and byte(field, 1) == 29 then return end
  if da ~= 0 then
    available[field] = available[field] + da
    new_available[field] = available[field]
  end
  if dr ~= 0 then
    -- Closed records may name fields that the bulk read did not fetch.
    if reserved[field] == nil then reserved[field] = tonumber(call('HGET', KEYS[3], field) or '0') end
    reserved[field] = reserved[field] + dr
    new_reserved[field] = reserved[field]
  end
end

local function fetch(field)
  if available[field] == nil then
    local value = call('HGET', KEYS[2], field)
    if value then available[field] = tonumber(value) end
  end
  return available[field]
end

local function remember(key, fingerprint, remaining, order, lines)
  local text = fingerprint .. RS .. position .. RS .. RS .. concat(remaining, ',')  -- numbers below 1e14 print exactly
  if lines then
    text = text .. RS .. order .. RS .. concat(lines, RS)
  elseif order ~= '' then
    text = text .. RS .. order
  end
  results[key] = text
  new_results[key] = text
end

local function forget(key)
  results[key] = nil
  new_results[key] = false
end

local function amounts(text)
  local original, confirmed, released, expired = string.match(text, '^(%d+)/(%d+)/(%d+)/(%d+)$')
  if not original then return tonumber(text), 0, 0, 0 end
  return tonumber(original), tonumber(confirmed), tonumber(released), tonumber(expired)
end

local function open_of(text)
  local original, confirmed, released, expired = amounts(text)
  return original - confirmed - released - expired
end

local function set_amounts(record, j, original, confirmed, released, expired)
  if confirmed == 0 and released == 0 and expired == 0 then
    record[j] = int(original)
  else
    record[j] = int(original) .. '/' .. int(confirmed) .. '/' .. int(released) .. '/' .. int(expired)
  end
end

local function keep_hold(key, record)
  holds[key] = record
  new_holds[key] = record
end

local function drop_hold(key)
  holds[key] = nil
  new_holds[key] = false
  new_expiry[key] = false
end

local function close_hold(key, record, state)
  drop_hold(key)
  record[1] = state
  local text = concat(record, RS)
  results[key .. '\31'] = text
  new_results[key .. '\31'] = text
end

local apart, aborted, decided  -- made below, for calls over several partitions only

local function journaled(i, op, lines, remaining, expires_at, kind)
  local own, left, extra = lines, remaining, op[8]
  if spanning then own, left, extra = apart(lines, remaining, extra) end
  journal[#journal + 1] = {kind or op[1], op[2], op[3], own, left, op[5], op[6], expires_at, extra}
  if lines == op[4] and not CLOSES[op[1]] then
    answers[i] = #remaining > 0 and '[0,' .. concat(remaining, ',') .. ']' or '[0]'
  else
    answers[i] = '[-1,' .. cjson.encode(remaining) .. ',' .. cjson.encode(lines) .. ',' .. cjson.encode(op[5]) .. ']'
  end
end

local LEDGER_NEUTRAL = {credit = true, void = true, correct = true}

-- What of an operation, or of the record of its hold, is leaving; nil: nothing.
local function gone(op, record)
  local away
  local function look(list, from)
    for j = from, #list, 2 do
      if leaving(list[j]) then
        away = away or {30}
        away[#away + 1] = list[j]
      end
    end
  end
  if op and (not LEDGER_NEUTRAL[op[1]] or find(op[10], 'l', 1, true)) then
    look(op[4], 1)
    if op[1] == 'keep' then look({op[10]}, 1) end
    record = holds[op[1] == 'reserve' and op[2] or op[6]]
  end
  if record then look(record, 6) end
  return away
end

-- Lines of a take: loaded, not frozen, covered; answers the refusal, or nil.
local function uncovered(lines)
  local unknown, blocked, short
  for j = 1, #lines, 2 do
    local field, asked = lines[j], lines[j + 1]
    local there = available[field]
    if there == nil then
      if byte(field, 1) ~= 29 then
        unknown = unknown or {4}
        unknown[#unknown + 1] = field
      end
    elseif any_frozen and frozen[field] then
      blocked = blocked or {5}
      blocked[#blocked + 1] = field
    elseif there < asked then
      short = short or {3}
      short[#short + 1] = field
      short[#short + 1] = asked
      short[#short + 1] = there
    end
  end
  return unknown or blocked or short
end

local function take(lines, held, there)
  local remaining = {}
  for j = 1, #lines, 2 do
    local field, asked = lines[j], lines[j + 1]
    move(field, -asked, held and asked or 0)
    remaining[#remaining + 1] = available[field] or there[(j + 1) / 2]
  end
  return remaining
end

-- What the queue must have besides the operation's own entry: what gave back the stock that it sells.
local function rest(op, lines)
  if not find(op[10], 'Q', 1, true) then return end
  for j = 1, #lines, 2 do rests[lines[j]] = true end
end

if spanning then

-- Lines here, what remained of them, and `extra` with the lines of other partitions: [[partition, "", [field, quantity, ...], []], ...]
function apart(lines, remaining, extra)
  local own, left, parts, at = {}, {}, {}, {}
  for j = 1, #lines, 2 do
    if byte(lines[j], 1) == 29 then
      local partition, field = string.match(lines[j], '^\29(%d+)\29(.*)$')
      if not at[partition] then
        parts[#parts + 1] = {tonumber(partition), '', {}, {}}
        at[partition] = parts[#parts][3]
      end
      local there = at[partition]
      there[#there + 1] = field
      there[#there + 1] = lines[j + 1]
    else
      own[#own + 1] = lines[j]
      own[#own + 1] = lines[j + 1]
      left[#left + 1] = remaining[(j + 1) / 2]
    end
  end
  if #parts == 0 then return lines, remaining, extra end
  if find(extra, '"parts":', 1, true) then return own, left, extra end
  local text = '"parts":' .. cjson.encode(parts) .. '}'
  return own, left, extra == '' and '{' .. text or sub(extra, 1, -2) .. ',' .. text
end

-- The one decision of a call over several partitions. A part that somebody has given up can't be decided on any more.
function aborted(op)
  for j = 1, #op[11] do
    if results[abort_name(op[2], op[11][j]) .. '\31'] then return true end
  end
  return false
end

function decided(i, op, remaining, expires_at)
  local marks = {}
  for j = 1, #op[11] do marks[j] = op[11][j][1] .. ':' .. op[11][j][2] end
  local kept = find(op[10], 'k', 1, true) and 'k' or ''
  local text = op[3] .. RS .. position .. RS .. kept .. RS .. concat(remaining, ',') .. '|' .. concat(marks, ' ')
  if op[5] ~= '' then text = text .. RS .. op[5] end
  results[op[2]], new_results[op[2]] = text, text
  local own, left = apart(op[4], remaining, '')
  journal[#journal + 1] = {op[1], op[2], op[3], own, left, op[5], op[6], expires_at, op[8]}
  answers[i] = '[-1,' .. cjson.encode(remaining) .. ',' .. cjson.encode(op[4]) .. ',' .. cjson.encode(op[5]) .. ']'
end

end

-- Decisions, one function per kind ------------------------------------------------------------------------------------------
local decide = {}

local function seen(op)
  local record = results[op[2]]
  if not record then return nil end
  if find(record, op[3] .. RS, 1, true) ~= 1 then return {2} end
  if IS_TAKE[op[1]] then  -- what is not loaded may be the database's by now, and so is the answer
    local unknown = {4}
    for j = 1, #op[4], 2 do
      if available[op[4][j]] == nil and byte(op[4][j], 1) ~= 29 then unknown[#unknown + 1] = op[4][j] end
    end
    if #unknown > 1 then return unknown end
  end
  if any_givers then
    local lines = op[4]
    if #lines == 0 then lines = {unpack(split(record), 6)} end
    rest(op, lines)
  end
  return {1, record}
end

function decide.deduct(i, op)
  local answer = seen(op)
  if answer then return answer end
  if full then return {8} end
  local lines = op[4]
  if #lines == 2 and not any_frozen then  -- one line, most calls: the same as below without its loops
    local field, left = lines[1], available[lines[1]]
    if left and left >= lines[2] then
      left = left - lines[2]
      available[field], new_available[field] = left, left
      local key, text = op[2], op[3] .. RS .. position .. RS .. RS .. left
      if op[5] ~= '' then text = text .. RS .. op[5] end
      results[key], new_results[key] = text, text
      journal[#journal + 1] = {op[1], key, op[3], lines, {left}, op[5], op[6], 0, op[8]}
      answers[i] = '[0,' .. left .. ']'
      if any_givers then rest(op, lines) end
      return nil
    end
  end
  if op[11] and aborted(op) then return {14} end
  answer = uncovered(lines)
  if answer then return answer end
  local remaining = take(lines, false, op[12])
  if any_givers then rest(op, lines) end
  if op[11] then return decided(i, op, remaining, 0) end
  remember(op[2], op[3], remaining, op[5])
  journaled(i, op, lines, remaining, 0)
end
decide.adjust = decide.deduct

function decide.reserve(i, op)
  local key = op[2]
  local hold = holds[key]
  local answer = seen(op)
  if answer and answer[1] ~= 1 then return answer end
  if hold then
    if hold[3] ~= op[3] then return {2} end
    if any_givers then rest(op, op[4]) end
    -- After the results window a hold answers for itself; what remained then is not known any more.
    return answer or {1, hold[3] .. RS .. hold[2] .. RS .. RS .. RS .. hold[5]}
  end
  local closed = results[key .. '\31']
  if closed then
    local state = sub(closed, 1, 1)
    if state == CONFIRMED and answer then return answer end
    return {6, state}
  end
  if answer then return {13, answer[2]} end
  if full then return {8} end
  if op[11] and aborted(op) then return {14} end
  local lines = op[4]
  answer = uncovered(lines)
  if answer then return answer end
  local pinned = find(op[10], 'p', 1, true)
  local expires_at = pinned and op[7] or op[7] > 0 and now + op[7] or 0
  local remaining = take(lines, true, op[12])
  if any_givers then rest(op, lines) end
  local record = {pinned and PINNED or HELD, position, op[3], int(expires_at), op[5]}
  for j = 1, #lines, 2 do
    record[#record + 1] = lines[j]
    record[#record + 1] = int(lines[j + 1])
  end
  keep_hold(key, record)
  if pinned then new_expiry[key] = now + tonumber(op[9]) elseif expires_at > 0 then new_expiry[key] = expires_at end
  if op[11] then return decided(i, op, remaining, expires_at) end
  remember(key, op[3], remaining, op[5])
  journaled(i, op, lines, remaining, expires_at)
end

if not only_takes then  -- making the functions below costs a lone take a tenth of its time

-- The lines that a confirm or release closes: all that is open, or the part asked for.
local function closing(hold, asked)
  local lines = {}
  if #asked == 0 then
    for j = 6, #hold, 2 do
      local open = open_of(hold[j + 1])
      if open > 0 then
        lines[#lines + 1] = hold[j]
        lines[#lines + 1] = open
      end
    end
    return lines
  end
  local at, over = {}, nil
  for j = 6, #hold, 2 do at[hold[j]] = open_of(hold[j + 1]) end
  for j = 1, #asked, 2 do
    local open = at[asked[j]] or 0
    if asked[j + 1] > open then
      over = over or {9}
      over[#over + 1] = asked[j]
      over[#over + 1] = asked[j + 1]
      over[#over + 1] = open
    end
  end
  return asked, over
end

-- Moves `lines` of the hold from open to confirmed, released or expired, and closes it when nothing is open any more.
local function close_lines(key, hold, lines, state)
  local by = {}
  for j = 1, #lines, 2 do by[lines[j]] = lines[j + 1] end
  local left = 0
  for j = 6, #hold, 2 do
    local original, confirmed, released, expired = amounts(hold[j + 1])
    local q = by[hold[j]]
    if q then
      if state == CONFIRMED then confirmed = confirmed + q
      elseif state == RELEASED then released = released + q
      else expired = expired + q end
      set_amounts(hold, j + 1, original, confirmed, released, expired)
    end
    left = left + original - confirmed - released - expired
  end
  local remaining = {}
  for j = 1, #lines, 2 do
    local field, q = lines[j], lines[j + 1]
    if state ~= CONFIRMED and byte(field, 1) ~= 29 then gave[field] = true end
    move(field, state == CONFIRMED and 0 or q, -q)
    remaining[#remaining + 1] = available[field] or 0
  end
  if left == 0 then close_hold(key, hold, state) else keep_hold(key, hold) end
  return remaining
end

-- Fields of a hold that are not loaded (only after a rebuild that loads lazily).
local function not_loaded(lines)
  local unknown
  for j = 1, #lines, 2 do
    if available[lines[j]] == nil and byte(lines[j], 1) ~= 29 then
      unknown = unknown or {4}
      unknown[#unknown + 1] = lines[j]
    end
  end
  return unknown
end

local function reacquire(i, op, closed)
  for j = 6, #closed, 2 do
    if byte(closed[j], 1) == 29 then return {6, EXPIRED} end  -- taking again over several partitions is a call of its own
  end
  if op[5] == '' then op[5] = closed[5] end
  local lines = {}
  for j = 6, #closed, 2 do
    local _, _, _, expired = amounts(closed[j + 1])
    if expired > 0 then
      lines[#lines + 1] = closed[j]
      lines[#lines + 1] = expired
      fetch(closed[j])
    end
  end
  if full then return {8} end
  local answer = uncovered(lines)
  if answer then return answer end
  local remaining = take(lines, false)
  if any_givers then rest(op, lines) end
  for j = 6, #closed, 2 do
    local original, confirmed, released, expired = amounts(closed[j + 1])
    set_amounts(closed, j + 1, original, confirmed + expired, released, 0)
  end
  close_hold(op[6], closed, CONFIRMED)
  remember(op[2], op[3], remaining, op[5], lines)
  journaled(i, op, lines, remaining, 0, 'reacquire')
end

-- A confirm whose reserve went with an epoch: it takes what that had taken, and leaves it closed.
local function stand_in(i, op)
  if full then return {8} end
  local lines = op[4]
  local answer = uncovered(lines)
  if answer then return answer end
  local remaining = take(lines, false)
  local record = {CONFIRMED, position, '', '0', op[5]}
  for j = 1, #lines, 2 do
    record[#record + 1] = lines[j]
    set_amounts(record, #record + 1, lines[j + 1], lines[j + 1], 0, 0)
  end
  close_hold(op[6], record, CONFIRMED)
  remember(op[2], op[3], remaining, op[5], lines)
  journaled(i, op, lines, remaining, 0, 'reacquire')
end

local function close(i, op, state)
  local answer = seen(op)
  if answer then return answer end
  local key, flag = op[6], op[10]
  local hold = holds[key]
  if not hold then
    local closed = closed_record(key)
    if closed then
      if any_frozen then
        for j = 6, #closed, 2 do frozen[closed[j]] = call('HGET', KEYS[4], closed[j]) or nil end
        local away = gone(nil, closed)
        if away then return away end
      end
      if state == CONFIRMED and closed[1] == EXPIRED and find(flag, 'r', 1, true) then return reacquire(i, op, closed) end
      return {6, closed[1]}
    end
    if state == CONFIRMED and find(flag, 's', 1, true) then return stand_in(i, op) end
    if not find(flag, 't', 1, true) then return {7} end
    local text = RELEASED .. RS .. position .. RS .. RS .. '0' .. RS
    results[key .. '\31'] = text
    new_results[key .. '\31'] = text
    journaled(i, op, {}, {}, 0, 'tombstone')
    return nil
  end
  if hold[1] == PINNED and not find(flag, 'd', 1, true) then return {10} end
  if op[5] == '' then op[5] = hold[5] end
  local lines, over = closing(hold, op[4])
  if over then return over end
  answer = not_loaded(lines)
  if answer then return answer end
  local remaining = close_lines(key, hold, lines, state)
  if any_givers then rest(op, lines) end
  remember(op[2], op[3], remaining, op[5], (#op[4] == 0 or find(flag, 's', 1, true)) and lines or nil)
  journaled(i, op, lines, remaining, 0)
end

function decide.confirm(i, op) return close(i, op, CONFIRMED) end
function decide.release(i, op) return close(i, op, RELEASED) end

function decide.expire(i, op)
  local key = op[6]
  local hold = holds[key]
  if not hold then
    new_expiry[key] = false
    return {7}
  end
  local score = tonumber(call('ZSCORE', KEYS[8], key) or '0')
  if new_expiry[key] ~= nil then score = new_expiry[key] or 0 end
  if score == 0 or now < score then return {12, score} end
  if hold[1] == PINNED then return {10} end
  local lines = closing(hold, {})
  local answer = not_loaded(lines)
  if answer then return answer end
  op[3], op[5] = hold[3], hold[5]
  local remaining = close_lines(key, hold, lines, EXPIRED)
  journaled(i, op, lines, remaining, 0)
end

-- Changes of a hold that move nothing: its time, its pin.
local function change(i, op, state)
  local key = op[6]
  local hold = holds[key]
  if not hold then
    local closed = closed_record(key)
    if closed then return {6, closed[1]} end
    return {7}
  end
  if hold[1] == PINNED and op[1] == 'extend' then return {10} end
  local due = op[7] > 0 and now + op[7] or 0
  hold[1] = state
  if state == PINNED then
    hold[4] = int(op[7])
    new_expiry[key] = now + tonumber(op[9])
    due = op[7]
  else
    hold[4] = int(due)
    new_expiry[key] = due > 0 and due or false
  end
  keep_hold(key, hold)
  journaled(i, op, op[4], {}, due)
end

function decide.extend(i, op) return change(i, op, HELD) end
function decide.resume(i, op) return change(i, op, HELD) end
function decide.pin(i, op) return change(i, op, PINNED) end

function decide.undo(i, op)
  local key, mark = op[6], op[9]
  if op[10] == 'claim' then key = sub(key, 1, -7) end
  local record = results[key] and split(results[key]) or nil
  local hold = holds[key]
  if not record or record[1] ~= op[3] or record[2] ~= mark or record[3] == 'k' then return {11} end
  if op[10] == 'reserve' then
    if not hold or hold[2] ~= mark or hold[3] ~= op[3] then return {11} end
    if hold[1] == PINNED and op[7] ~= 1 then return {10} end
    for j = 6, #hold, 2 do
      local original = amounts(hold[j + 1])
      if open_of(hold[j + 1]) ~= original then return {11} end
    end
  end
  local lines, remaining = op[4], {}
  local answer = not_loaded(lines)
  if answer then return answer end
  for j = 1, #lines, 2 do
    if byte(lines[j], 1) ~= 29 then gave[lines[j]] = true end
    move(lines[j], lines[j + 1], op[10] == 'reserve' and -lines[j + 1] or 0)
    remaining[#remaining + 1] = available[lines[j]] or 0
  end
  if hold and op[10] == 'reserve' then drop_hold(key) end
  forget(key)
  journaled(i, op, lines, remaining, 0)
end

function decide.keep(i, op)
  local key, mark = op[6], op[9]
  local record = results[key] and split(results[key]) or nil
  -- Without its record a take can't be undone, so a hold that outlived the results windows is kept as it is.
  if not record and holds[key] and holds[key][2] == mark then return {1, ''} end
  if not record or record[2] ~= mark then return {11} end
  if record[3] == 'k' then return {1, results[key]} end
  record[3] = 'k'
  local text = concat(record, RS)
  results[key] = text
  new_results[key] = text
  journaled(i, op, op[4], {}, 0)
end

-- Whoever joins in keeps it: the act of one of them may be done, though the other's was refused.
function decide.claim(i, op)
  local id = op[6]
  local record = results[id] and split(results[id])
  if not record then
    remember(id, op[3], {}, op[5])
    journaled(i, op, op[4], {}, 0)
    return nil
  end
  if record[1] ~= op[3] then return {2} end
  if record[3] ~= 'k' then
    record[3] = 'k'
    local text = concat(record, RS)
    results[id], new_results[id] = text, text
    journal[#journal + 1] = {'keep', op[2] .. '\31keep', '', {}, {}, '', op[2], 0, ''}
  end
  return {1, results[id]}
end

-- A part comes up to what its call's home has decided: never back, so an old follower does nothing.
function decide.follow(i, op)
  local key, target = op[6], op[11]
  local hold = holds[key]
  if not hold then
    local closed = closed_record(key)
    return closed and {6, closed[1]} or {7}
  end
  if hold[1] ~= PINNED or hold[2] ~= op[9] then return {11} end
  local place, sold, back, gone = {}, {}, {}, {}
  for j = 6, #hold, 2 do place[hold[j]] = hold[j + 1] end
  for j = 1, #target, 4 do
    local field = target[j]
    local original, confirmed, released, expired = amounts(place[field] or '0')
    local open = original - confirmed - released - expired
    local more = math.max(0, target[j + 1] - confirmed)
    if more > open then return {9, field, more, open} end
    -- What the part gave back and home has forgotten since (its Redis went back) comes again with home's next end: only the rest.
    local freed = math.min(math.max(0, target[j + 2] - released), open - more)
    local over = math.min(math.max(0, target[j + 3] - expired), open - more - freed)
    if more > 0 then sold[#sold + 1], sold[#sold + 2] = field, more end
    if freed > 0 then back[#back + 1], back[#back + 2] = field, freed end
    if over > 0 then gone[#gone + 1], gone[#gone + 2] = field, over end
  end
  if #sold + #back + #gone == 0 then return {1, ''} end
  local answer = not_loaded(sold) or not_loaded(back) or not_loaded(gone)
  if answer then return answer end
  local name, order = '\31' .. position .. '.' .. i, hold[5]
  local function moved(kind, lines, remaining)
    journal[#journal + 1] = {kind, key .. '\31' .. kind .. name, 'follow', lines, remaining, order, key, 0, ''}
  end
  if #sold > 0 then
    local remaining = close_lines(key, hold, sold, CONFIRMED)
    if op[10] == 'a' then  -- in the ledger a write-off takes what is available
      moved('release', sold, remaining)
      moved('adjust', sold, remaining)
    else
      moved('confirm', sold, remaining)
    end
  end
  if #back > 0 then moved('release', back, close_lines(key, hold, back, RELEASED)) end
  if #gone > 0 then moved('expire', gone, close_lines(key, hold, gone, EXPIRED)) end
  answers[i] = '[0]'
end

function decide.abort(i, op)
  local record = results[op[6]]
  local named = record and ' ' .. (string.match(split(record)[4] or '', '|(.*)$') or '') .. ' ' or ''
  local new = {}
  for j = 1, #op[11] do
    local part = op[11][j]
    if find(named, ' ' .. part[1] .. ':' .. part[2] .. ' ', 1, true) then return {1, record} end
    local name = abort_name(op[6], part)
    if not results[name .. '\31'] then new[#new + 1] = name end
  end
  if #new == 0 then return {1, ''} end
  for j = 1, #new do
    local text = RELEASED .. RS .. position .. RS .. RS .. '0' .. RS
    results[new[j] .. '\31'], new_results[new[j] .. '\31'] = text, text
    journal[#journal + 1] = {'tombstone', new[j], '', {}, {}, '', new[j], 0, ''}
  end
  answers[i] = '[0]'
end

-- What the ledger owes Redis it owes in one epoch: the rebuild that follows has included it.
local function over(op) return op[9] ~= '' and string.match(op[9], '^%d+') ~= epoch end

function decide.credit(i, op)
  local answer = seen(op)
  if answer then return answer end
  if over(op) then return {15} end
  local lines, remaining = op[4], {}
  answer = not_loaded(lines)
  if answer then return answer end
  for j = 1, #lines, 2 do
    move(lines[j], lines[j + 1], 0)
    remaining[#remaining + 1] = available[lines[j]]
  end
  remember(op[2], op[3], remaining, op[5])
  -- The id of what entered through the ledger is taken here too, so that a take can't use it again.
  if op[6] ~= '' and not results[op[6]] then remember(op[6], 'entered', remaining, op[5]) end
  journaled(i, op, lines, remaining, 0)
end

-- Redis comes up (or down) to the ledger, below zero if need be: by a delta, so it holds whatever is sold meanwhile.
function decide.correct(i, op)
  local answer = seen(op)
  if answer then return answer end
  local lines, names, remaining, written = op[4], {}, {}, {}
  for j = 1, #lines, 3 do
    names[#names + 1] = lines[j]
    names[#names + 1] = 0
  end
  answer = not_loaded(names)
  if answer then return answer end
  local ledgers = find(op[10], 'l', 1, true)
  for j = 1, #lines, 3 do
    if ledgers then
      written[#written + 1] = lines[j]
      written[#written + 1] = lines[j + 1]
    else
      move(lines[j], lines[j + 1], lines[j + 2])
    end
    remaining[#remaining + 1] = available[lines[j]]
  end
  if ledgers then
    journal[#journal + 1] = {'adjust', op[2] .. '\31ledger', op[3], written, remaining, '', '', 0, op[8]}
  end
  remember(op[2], op[3], remaining, op[5])
  journaled(i, op, lines, remaining, 0)
end

function decide.void(i, op)
  local answer = seen(op)
  if answer then return answer end
  if over(op) then return {15} end
  local lines, key, flag, names = op[4], op[6], op[10], {}
  for j = 1, #lines, 3 do
    names[#names + 1] = lines[j]
    names[#names + 1] = 0
  end
  answer = not_loaded(names)
  if answer then return answer end
  local remaining = {}
  for j = 1, #lines, 3 do
    if lines[j + 1] > 0 then gave[lines[j]] = true end
    move(lines[j], lines[j + 1], lines[j + 2])
    remaining[#remaining + 1] = available[lines[j]]
    if find(flag, 'f', 1, true) then
      local mark = leaving(lines[j]) and string.match(frozen[lines[j]], '^w%d+') .. ' ' .. position or position
      new_frozen[lines[j]] = mark
      any_frozen, frozen[lines[j]] = true, mark
    end
  end
  if key ~= '' then
    local hold = holds[key]
    if hold and hold[2] == op[9] then drop_hold(key) end
    -- A refused take frees its id; a duplicate's first effect stands, so its answer stands.
    local record = find(flag, 'f', 1, true) and results[key] and split(results[key])
    if record and record[2] == op[9] then forget(key) end
  end
  remember(op[2], op[3], remaining, op[5])
  journaled(i, op, lines, remaining, 0)
end

end

for i = 1, #ops do
  local op = ops[i]
  local answer = any_leaving and gone(op) or decide[op[1]](i, op)
  if answer then answers[i] = cjson.encode(answer) end
end

local givers = {}
if next(rests) then
  local names, found = {}, {}
  for field in pairs(rests) do names[#names + 1] = field end
  hmget(KEYS[9], names, found)
  for field, sequences in pairs(found) do
    givers[#givers + 1] = field
    givers[#givers + 1] = sequences
  end
end

-- Bulk writes -----------------------------------------------------------------------------------------------------------------
local function bulk(command, key, pairs_list)
  for from = 1, #pairs_list, SLICE do
    call(command, key, unpack(pairs_list, from, math.min(from + SLICE - 1, #pairs_list)))
  end
end

local body = ''
if #journal > 0 then
  body = entry(journal)
  call('XADD', KEYS[10], position, 'b', body, unpack(ARGV, 8))
  seq = int(tonumber(seq) + 1)
  call('HSET', KEYS[1], 'seq', seq)

  local function counters(key, values)
    local list, n = {}, 0
    for field, value in pairs(values) do
      list[n + 1], list[n + 2], n = field, int(value), n + 2
    end
    if n > 0 then bulk('HSET', key, list) end
  end
  counters(KEYS[2], new_available)
  counters(KEYS[3], new_reserved)

  local set, gone = {}, {}
  for key, text in pairs(new_results) do
    if text then
      set[#set + 1] = key
      set[#set + 1] = text
    else
      gone[#gone + 1] = key
    end
  end
  bulk('HSET', current, set)
  bulk('HDEL', current, gone)
  bulk('HDEL', previous, gone)

  set, gone = {}, {}
  for key, record in pairs(new_holds) do
    if record then
      set[#set + 1] = key
      if #record == 7 and record[3] == one_line_mark(record[6], string.match(record[7], '^%d+')) then record[3] = '' end
      set[#set + 1] = concat(record, RS)
    else
      gone[#gone + 1] = key
    end
  end
  bulk('HSET', KEYS[7], set)
  bulk('HDEL', KEYS[7], gone)

  set = {}
  for field, mark in pairs(new_frozen) do
    set[#set + 1] = field
    set[#set + 1] = mark
  end
  bulk('HSET', KEYS[4], set)

  if confirms and next(gave) then
    local names, known = {}, {}
    for field in pairs(gave) do names[#names + 1] = field end
    if any_givers then hmget(KEYS[9], names, known) end
    set = {}
    for n = 1, #names do
      local before = known[names[n]]
      local text = seq
      if before then
        local _, commas = string.gsub(before, ',', '')
        local many = sub(before, 1, 1) == '*' or commas >= MOST_GIVERS - 1
        text = many and '*' .. seq or before .. ',' .. seq
      end
      set[#set + 1] = names[n]
      set[#set + 1] = text
    end
    bulk('HSET', KEYS[9], set)
  end
end

local scored, gone = {}, {}
for key, score in pairs(new_expiry) do
  if score then
    scored[#scored + 1] = int(score)
    scored[#scored + 1] = key
  else
    gone[#gone + 1] = key
  end
end
bulk('ZADD', KEYS[8], scored)
bulk('ZREM', KEYS[8], gone)

if not confirms then body = '' end
local reply = {'ok', int(now), epoch, seq, '[' .. concat(answers, ',') .. ']', body}
if #givers > 0 then reply[7] = cjson.encode(givers) end
return concat(reply, '\n')
