-- Who and where: what a process must know before its first batch, and what the worker asks.
-- KEYS  1 meta  2 journal, and all others of the partition: while its slot moves, nobody must take a half for the whole
-- Reply {now ms, epoch or "", sequence, state, run_id as opened, run_id now,
--        id of this epoch's oldest entry or "", entries in the journal, highest sequence that the ledger had applied,
--        why it is suspect or "", highest sequence that was seen then, ms when it stopped selling,
--        how far older results are restored or "", how stock was told apart when it was opened or ""}

local t = redis.call('TIME')
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'state', 'run_id', 'applied', 'why', 'seen', 'frozen_at',
  'older', 'layout')
local info = redis.pcall('INFO', 'server')
local run_id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
local first = {}
if meta[1] then first = redis.call('XRANGE', KEYS[2], meta[1] .. '-0', meta[1] .. '-18446744073709551615', 'COUNT', 1) end
return {string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000)), meta[1] or '', meta[2] or '0', meta[3] or '',
  meta[4] or '', run_id, first[1] and first[1][1] or '', redis.call('XLEN', KEYS[2]),
  meta[5] or '0', meta[6] or '', meta[7] or '0', meta[8] or '0', meta[9] or '', meta[10] or ''}
