-- A small Redis: the commands that the SDK's scripts and clients use, on Lua tables. Commands that write are logged in groups
-- (one group per script call or command), so that a restart can forget the last ones, as a Redis without fsync does.
--
-- Returns the functions that the double in Python calls.

local find, sub, byte, fmt, char = string.find, string.sub, string.byte, string.format, string.char
local db, clock_ms, clock_us, run_id, fail_xadd, full
local group, seen

-- JSON, as Redis' cjson reads and prints it ---------------------------------------------------------------------------------

local PLAIN = {b = '\b', f = '\f', n = '\n', r = '\r', t = '\t', ['"'] = '"', ['\\'] = '\\', ['/'] = '/'}

local function utf8(code)
  if code < 0x80 then return char(code) end
  if code < 0x800 then return char(0xC0 + math.floor(code / 64), 0x80 + code % 64) end
  if code < 0x10000 then return char(0xE0 + math.floor(code / 4096), 0x80 + math.floor(code / 64) % 64, 0x80 + code % 64) end
  return char(0xF0 + math.floor(code / 262144), 0x80 + math.floor(code / 4096) % 64, 0x80 + math.floor(code / 64) % 64, 0x80 + code % 64)
end

local function read_string(text, at)
  local out, n = {}, 0
  while true do
    local stop = find(text, '["\\]', at)
    n = n + 1
    out[n] = sub(text, at, stop - 1)
    if byte(text, stop) == 34 then return table.concat(out), stop + 1 end
    local mark = sub(text, stop + 1, stop + 1)
    n = n + 1
    if mark == 'u' then
      local code = tonumber(sub(text, stop + 2, stop + 5), 16)
      at = stop + 6
      if code >= 0xD800 and code < 0xDC00 then
        code = 0x10000 + (code - 0xD800) * 1024 + tonumber(sub(text, at + 2, at + 5), 16) - 0xDC00
        at = at + 6
      end
      out[n] = utf8(code)
    else
      out[n] = PLAIN[mark]
      at = stop + 2
    end
  end
end

local read_value
local function read_list(text, at)
  local out, n = {}, 0
  at = find(text, '%S', at)
  if byte(text, at) == 93 then return out, at + 1 end
  while true do
    n = n + 1
    out[n], at = read_value(text, at)
    at = find(text, '%S', at)
    if byte(text, at) == 93 then return out, at + 1 end
    at = at + 1
  end
end

local function read_object(text, at)
  local out = {}
  at = find(text, '%S', at)
  if byte(text, at) == 125 then return out, at + 1 end
  while true do
    local name
    name, at = read_string(text, find(text, '"', at, true) + 1)
    out[name], at = read_value(text, find(text, ':', at, true) + 1)
    at = find(text, '%S', at)
    if byte(text, at) == 125 then return out, at + 1 end
    at = at + 1
  end
end

function read_value(text, at)
  at = find(text, '%S', at)
  local first = byte(text, at)
  if first == 34 then return read_string(text, at + 1) end
  if first == 91 then return read_list(text, at + 1) end
  if first == 123 then return read_object(text, at + 1) end
  if first == 116 then return true, at + 4 end
  if first == 102 then return false, at + 5 end
  if first == 110 then return nil, at + 4 end
  local from, upto = find(text, '^[-+%d.eE]+', at)
  return tonumber(sub(text, from, upto)), upto + 1
end

local ESCAPED = {['"'] = '\\"', ['\\'] = '\\\\', ['/'] = '\\/', ['\b'] = '\\b', ['\f'] = '\\f', ['\n'] = '\\n', ['\r'] = '\\r', ['\t'] = '\\t', ['\127'] = '\\u007f'}
local function escape(c) return ESCAPED[c] or fmt('\\u%04x', byte(c)) end

local function print_value(value)
  local kind = type(value)
  if kind == 'string' then
    if find(value, '[%c"\\/\127]') then value = string.gsub(value, '[%z%c"\\/\127]', escape) end
    return '"' .. value .. '"'
  elseif kind == 'number' then
    return fmt('%.14g', value)
  elseif kind == 'table' then
    local n = #value
    if n > 0 then
      local out = {}
      for i = 1, n do out[i] = print_value(value[i]) end
      return '[' .. table.concat(out, ',') .. ']'
    end
    local out = {}
    for name, each in pairs(value) do out[#out + 1] = print_value(tostring(name)) .. ':' .. print_value(each) end
    return '{' .. table.concat(out, ',') .. '}'
  end
  return tostring(value)
end

cjson = {decode = function(text) return (read_value(text, 1)) end, encode = print_value}

-- The keys --------------------------------------------------------------------------------------------------------------------

local commands, writes = {}, {}

local function typed(key, kind, make)
  local held = db.keys[key]
  if held and held.expires and clock_ms >= held.expires then
    db.keys[key] = nil
    held = nil
  end
  if held then
    if held.kind ~= kind then error('WRONGTYPE Operation against a key holding the wrong kind of value', 0) end
    return held
  end
  if not make then return nil end
  held = {kind = kind, n = 0, v = {}}
  db.keys[key] = held
  return held
end

local function drop_if_empty(key, held)
  if held.n == 0 then db.keys[key] = nil end
end

function commands.TIME() return {fmt('%.0f', math.floor(clock_ms / 1000)), fmt('%.0f', (clock_ms % 1000) * 1000 + clock_us)} end
function commands.INFO()
  if run_id == '' then error("NOPERM this user has no permissions to run the 'info' command", 0) end
  return '# Server\r\nredis_version:7.0.15\r\nrun_id:' .. run_id .. '\r\n'
end
function commands.PING() return {ok = 'PONG'} end

function commands.TYPE(key)
  local held = db.keys[key]
  return {ok = held and held.kind or 'none'}
end

function commands.EXISTS(...)
  local found = 0
  for _, key in ipairs({...}) do if db.keys[key] then found = found + 1 end end
  return found
end

function commands.DEL(...)
  local gone = 0
  for _, key in ipairs({...}) do
    if db.keys[key] then
      gone = gone + 1
      db.keys[key] = nil
    end
  end
  return gone
end
commands.UNLINK = commands.DEL

function commands.GET(key)
  local held = typed(key, 'string')
  return held and held.v or false
end

function commands.SET(key, value, option, time)
  local held = {kind = 'string', n = 1, v = value}
  if option and string.upper(option) == 'PX' then held.expires = clock_ms + tonumber(time) end
  if option and string.upper(option) == 'PXAT' then held.expires = tonumber(time) end
  db.keys[key] = held
  return {ok = 'OK'}
end

function commands.PTTL(key)
  local held = db.keys[key]
  if not held or (held.expires and clock_ms >= held.expires) then return -2 end
  return held.expires and held.expires - clock_ms or -1
end

function commands.PEXPIRE(key, time)
  local held = typed(key, 'string')
  if not held then return 0 end
  held.expires = clock_ms + tonumber(time)
  return 1
end

function commands.HGET(key, name)
  local held = typed(key, 'hash')
  return held and held.v[name] or false
end

function commands.HEXISTS(key, name)
  local held = typed(key, 'hash')
  return held and held.v[name] and 1 or 0
end

function commands.HMGET(key, ...)
  local held, out = typed(key, 'hash'), {}
  for i, name in ipairs({...}) do out[i] = held and held.v[name] or false end
  return out
end

function commands.HGETALL(key)
  local held, names, out = typed(key, 'hash'), {}, {}
  if not held then return out end
  for name in pairs(held.v) do names[#names + 1] = name end
  table.sort(names)
  for _, name in ipairs(names) do
    out[#out + 1] = name
    out[#out + 1] = held.v[name]
  end
  return out
end

function commands.HKEYS(key)
  local all, out = commands.HGETALL(key), {}
  for i = 1, #all, 2 do out[#out + 1] = all[i] end
  return out
end

-- All of it at once: small hashes are answered like that by a real one too.
function commands.HSCAN(key) return {'0', commands.HGETALL(key)} end

function commands.HLEN(key)
  local held = typed(key, 'hash')
  return held and held.n or 0
end

function commands.HSET(key, ...)
  local held, given, new = typed(key, 'hash', true), {...}, 0
  if #given == 0 or #given % 2 == 1 then error("ERR wrong number of arguments for 'hset' command", 0) end
  for i = 1, #given, 2 do
    if held.v[given[i]] == nil then new = new + 1 end
    held.v[given[i]] = given[i + 1]
  end
  held.n = held.n + new
  if seen and sub(key, -10) == ':available' then
    for i = 1, #given, 2 do
      seen[#seen + 1] = given[i]
      seen[#seen + 1] = given[i + 1]
    end
  end
  return new
end

function commands.HINCRBY(key, name, by)
  local held = typed(key, 'hash')
  local value = fmt('%.0f', tonumber(held and held.v[name] or '0') + tonumber(by))
  commands.HSET(key, name, value)
  return tonumber(value)
end

function commands.HSETNX(key, name, value)
  local held = typed(key, 'hash')
  if held and held.v[name] ~= nil then return 0 end
  commands.HSET(key, name, value)
  return 1
end

function commands.HDEL(key, ...)
  local held, gone = typed(key, 'hash'), 0
  if not held then return 0 end
  for _, name in ipairs({...}) do
    if held.v[name] ~= nil then
      held.v[name] = nil
      gone = gone + 1
    end
  end
  held.n = held.n - gone
  drop_if_empty(key, held)
  return gone
end

function commands.ZADD(key, ...)
  local held, given, new = typed(key, 'zset'), {...}, 0
  local only = string.upper(given[1]) == 'XX'
  if only then table.remove(given, 1) end
  if only and not held then return 0 end
  held = held or typed(key, 'zset', true)
  for i = 1, #given, 2 do
    local there = held.v[given[i + 1]] ~= nil
    if not there and not only then new = new + 1 end
    if there or not only then held.v[given[i + 1]] = tonumber(given[i]) end
  end
  held.n = held.n + new
  return new
end

function commands.ZREM(key, ...)
  local held, gone = typed(key, 'zset'), 0
  if not held then return 0 end
  for _, name in ipairs({...}) do
    if held.v[name] ~= nil then
      held.v[name] = nil
      gone = gone + 1
    end
  end
  held.n = held.n - gone
  drop_if_empty(key, held)
  return gone
end

function commands.ZCARD(key)
  local held = typed(key, 'zset')
  return held and held.n or 0
end

function commands.ZSCORE(key, name)
  local held = typed(key, 'zset')
  local score = held and held.v[name]
  return score and fmt('%.17g', score) or false
end

function commands.ZRANGEBYSCORE(key, low, high, limit, offset, count)
  local held, found, out = typed(key, 'zset'), {}, {}
  if not held then return out end
  for name, score in pairs(held.v) do
    if score >= tonumber(low) and score <= tonumber(high) then found[#found + 1] = {score, name} end
  end
  table.sort(found, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end)
  local from = limit and tonumber(offset) or 0
  for i = from + 1, limit and math.min(#found, from + tonumber(count)) or #found do out[#out + 1] = found[i][2] end
  return out
end

local function place(id, otherwise)
  if id == '-' then return 0, 0 end
  if id == '+' then return math.huge, math.huge end
  local major, minor = string.match(id, '^(%d+)-(%d+)$')
  if major then return tonumber(major), tonumber(minor) end
  return tonumber(id), otherwise
end

local function before(a, b, c, d) return a < c or (a == c and b < d) end

function commands.XADD(key, ...)
  if fail_xadd then error('ERR simulated: the entry could not be added', 0) end
  local given = {...}
  while given[1] == 'MAXLEN' do
    table.remove(given, 1)
    if given[1] == '~' or given[1] == '=' then table.remove(given, 1) end
    table.remove(given, 1)
  end
  local held = typed(key, 'stream', true)
  local id = table.remove(given, 1)
  local major, minor = place(id, 0)
  if held.last and not before(held.last[1], held.last[2], major, minor) then
    error('ERR The ID specified in XADD is equal or smaller than the target stream top item', 0)
  end
  held.last = {major, minor}
  held.n = held.n + 1
  held.v[held.n] = {id, given, major, minor}
  if seen then
    local added = seen.added or {}
    seen.added = added
    added[#added + 1] = key
    added[#added + 1] = id
    added[#added + 1] = given[2]
  end
  return id
end

function commands.XLEN(key)
  local held = typed(key, 'stream')
  return held and held.n or 0
end

function commands.XRANGE(key, first, last, option, count)
  local held, out = typed(key, 'stream'), {}
  if not held then return out end
  local a, b = place(first, 0)
  local c, d = place(last, math.huge)
  local most = option and tonumber(count) or math.huge
  for i = 1, held.n do
    local entry = held.v[i]
    if #out >= most or before(c, d, entry[3], entry[4]) then break end
    if not before(entry[3], entry[4], a, b) then out[#out + 1] = {entry[1], entry[2]} end
  end
  return out
end

function commands.XREVRANGE(key, last, first, option, count)
  local held, out = typed(key, 'stream'), {}
  if not held then return out end
  local a, b = place(first, 0)
  local c, d = place(last, math.huge)
  local most = option and tonumber(count) or math.huge
  for i = held.n, 1, -1 do
    local entry = held.v[i]
    if #out >= most or before(entry[3], entry[4], a, b) then break end
    if not before(c, d, entry[3], entry[4]) then out[#out + 1] = {entry[1], entry[2]} end
  end
  return out
end

function commands.XTRIM(key, option, id)
  local held = typed(key, 'stream')
  if not held then return 0 end
  assert(option == 'MINID')
  local a, b = place(id, 0)
  local kept = {}
  for i = 1, held.n do
    local entry = held.v[i]
    if not before(entry[3], entry[4], a, b) then kept[#kept + 1] = entry end
  end
  local gone = held.n - #kept
  held.v, held.n = kept, #kept
  return gone
end

-- What a full Redis refuses, unless the script has written before.
local denied = {SET = true, HSET = true, HSETNX = true, HINCRBY = true, ZADD = true, XADD = true}
for _, name in ipairs({'DEL', 'UNLINK', 'SET', 'HSET', 'HSETNX', 'HDEL', 'HINCRBY', 'ZADD', 'ZREM', 'XADD', 'XTRIM', 'PEXPIRE'}) do writes[name] = true end

-- What scripts see ------------------------------------------------------------------------------------------------------------

local function text_of(value)
  if type(value) == 'number' then return fmt('%.17g', value) end
  if type(value) ~= 'string' then error('Lua redis() command arguments must be strings or integers', 0) end
  return value
end

local function perform(name, ...)
  local command = commands[string.upper(name)]
  if not command then error("ERR unknown command '" .. name .. "' (the simulator's Redis lacks it)", 0) end
  if full and group == nil and denied[string.upper(name)] then error("OOM command not allowed when used memory > 'maxmemory'.", 0) end
  local given = {...}
  for i = 1, #given do given[i] = text_of(given[i]) end
  local reply = command(unpack(given))
  if writes[string.upper(name)] then
    if group == nil then group = {} end
    if string.upper(name) == 'SET' and given[3] then given[3], given[4] = 'PXAT', fmt('%.0f', db.keys[given[1]].expires) end
    group[#group + 1] = {string.upper(name), given}
  end
  return reply
end

redis = {
  call = perform,
  pcall = function(...)
    local done, reply = pcall(perform, ...)
    if done then return reply end
    return {err = tostring(reply)}
  end,
  sha1hex = nil,
}

local function enter(state, ms, us, server, trouble)
  db, clock_ms, clock_us, run_id, fail_xadd, full = state, ms, us, server, trouble == 'xadd', trouble == 'full'
  group, seen = nil, {}
end

local function leave()
  if group then db.log[#db.log + 1] = group end
  local added, counters = seen.added, #seen > 0 and seen or nil
  seen = nil
  return added, counters
end

local out = {}

function out.new() return {keys = {}, log = {}} end

function out.compile(text)
  local run, problem = loadstring(text, '@script')
  if not run then error(problem, 0) end
  return run
end

-- Answers (fine, reply, entries added or nil, counters written or nil).
function out.script(state, ms, us, server, trouble, run, keys, arguments)
  enter(state, ms, us, server, trouble)
  KEYS, ARGV = keys, arguments
  local fine, reply = pcall(run)
  return fine, reply, leave()
end

function out.command(state, ms, us, server, trouble, ...)
  enter(state, ms, us, server, trouble)
  local fine, reply = pcall(perform, ...)
  return fine, reply, leave()
end

-- A new state with only the first `count` groups of another one's log.
function out.replay(from, count)
  local state = out.new()
  clock_ms, clock_us, run_id, fail_xadd, full, seen = 0, 0, '', false, false, nil
  for i = 1, count do
    db = state
    for _, each in ipairs(from.log[i]) do commands[each[1]](unpack(each[2])) end
    state.log[i] = from.log[i]
  end
  return state
end

function out.length(state) return #state.log end

return out
