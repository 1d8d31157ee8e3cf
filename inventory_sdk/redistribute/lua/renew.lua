-- Keep keys for another lease, or learn that they were taken over.
--
-- KEYS[1]    due
-- KEYS[2..]  state, one per key
-- ARGV[1]    lease, ms
-- ARGV[2..]  two per key: key, fence
-- Replies, per key: 1 it is still ours, 0 it isn't
local time = redis.call('TIME')
local ends = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[1]))
local replies = {}
for n = 2, #KEYS do
  local at = 2 + (n - 2) * 2
  local state = redis.call('HMGET', KEYS[n], 'running', 'fence')
  if state[1] and state[2] == ARGV[at + 1] then
    redis.call('ZADD', KEYS[1], ends, ARGV[at])
    replies[#replies + 1] = 1
  else
    replies[#replies + 1] = 0
  end
end
return replies
