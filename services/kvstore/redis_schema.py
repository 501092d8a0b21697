"""What the kvstore keeps in Redis: the keys, and the scripts that read and change them in one step each.

Schema, version 1. All keys begin with `baton:1:`; the worker id in braces keeps the keys of one worker
on one node of a Redis Cluster.

    baton:1:workers              set      ids of the workers there are
    baton:1:{<worker id>}:member hash     `change`: a RegistryUpdate.Change as protobuf
                                          `incarnation`, `sequence`: how far `blocks` has come;
                                          sequence is `partial` while several writes make up one step
                                          `blocks`: how many blocks there are
    baton:1:{<worker id>}:blocks hash     block id (16 bytes) -> tiers, the sum of 1 << tier as decimal

Both keys of a worker expire `RETENTION_S` after its last sign of life. Every write is one script that
checks where the keys stand before it moves them, so a worker's blocks and sequence always agree, and a
Redis that lost writes is noticed and written anew. docs/redis.md is the operator's page about all this.
"""

from __future__ import annotations

PREFIX = "baton:1:"
WORKERS = f"{PREFIX}workers"
RETENTION_S = 300
PARTIAL = "partial"


def keys(worker_id: str) -> tuple[str, str]:
    """The keys of a worker: member and blocks."""
    return f"{PREFIX}{{{worker_id}}}:member", f"{PREFIX}{{{worker_id}}}:blocks"


# KEYS: member, blocks. ARGV: mode, incarnation, expected sequence, new sequence, retention, change,
# then pairs of block id and tiers (0: remove). Returns 0 when the keys are not where they should be.
WRITE = """
local mode, incarnation = ARGV[1], ARGV[2]
if mode ~= 'replace' then
  local at = redis.call('HMGET', KEYS[1], 'incarnation', 'sequence', 'blocks')
  local there = tostring(redis.call('HLEN', KEYS[2]))
  if at[1] ~= incarnation or at[2] ~= ARGV[3] or at[3] ~= there then return 0 end
end
-- First, as a full Redis refuses this: so nothing is lost that cannot be written anew.
redis.call('HSET', KEYS[1], 'incarnation', incarnation, 'sequence', ARGV[4], 'change', ARGV[6])
if mode == 'replace' then redis.call('UNLINK', KEYS[2]) end
local held, gone = {}, {}
for i = 7, #ARGV, 2 do
  if ARGV[i + 1] == '0' then gone[#gone + 1] = ARGV[i]
  else held[#held + 1] = ARGV[i]; held[#held + 1] = ARGV[i + 1] end
end
for i = 1, #held, 1000 do redis.call('HSET', KEYS[2], unpack(held, i, math.min(i + 999, #held))) end
for i = 1, #gone, 1000 do redis.call('HDEL', KEYS[2], unpack(gone, i, math.min(i + 999, #gone))) end
redis.call('HSET', KEYS[1], 'blocks', redis.call('HLEN', KEYS[2]))
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[5])
return 1
"""

# KEYS: member, blocks. ARGV: incarnation. A later incarnation's keys stay. However many blocks there are,
# this is short work: another thread of Redis frees what is unlinked.
REMOVE = """
local at = redis.call('HGET', KEYS[1], 'incarnation')
if at and at ~= ARGV[1] then return 0 end
redis.call('UNLINK', KEYS[1], KEYS[2])
return 1
"""

# KEYS: blocks. ARGV: cursor, count. Returns the next cursor, block ids end to end, and a byte of tiers for
# each: one long string is read much sooner than thousands of short ones.
READ = """
local page = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local ids, tiers = {}, {}
for i = 1, #page[2], 2 do
  local block, held = page[2][i], tonumber(page[2][i + 1])
  if #block == 16 and held and held < 256 then
    ids[#ids + 1] = block
    tiers[#tiers + 1] = string.char(held)
  end
end
return {page[1], table.concat(ids), table.concat(tiers)}
"""
