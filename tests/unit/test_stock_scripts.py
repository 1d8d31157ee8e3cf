"""What the scripts may touch, and that every table of theirs has its counterpart."""

from __future__ import annotations

import os
import random
import re
from importlib import resources
from typing import Any

import pytest

from inventory_sdk.model import Kind, fingerprint, key_of, partition_of
from inventory_sdk.stock import batch
from inventory_sdk.stock.partition import KEY_NAMES
from tests.stock_kit import MERCHANT, SERVERS, Shop, lines, shop_on

SCRIPTS = sorted(path.name for path in resources.files("inventory_sdk.stock").joinpath("lua").iterdir() if path.name.endswith(".lua"))
KEYLESS = {"TIME", "INFO"}
CALL = re.compile(r"""\b(?:redis\.p?call|call)\(\s*('[A-Z]+'|"[A-Z]+"|[a-z_]+)\s*(?:,\s*([^,()]+))?""")
ALIASES = {"current", "previous", "key"}
"""Names of locals that stand for a declared key; the tests below see where they come from."""


def source(name: str) -> str:
    text = resources.files("inventory_sdk.stock").joinpath("lua", name).read_text(encoding="utf-8")
    return re.sub(r"--[^\n]*", "", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_names_every_key_through_its_declared_ones(name: str) -> None:
    text = source(name)
    found = 0
    for command, key in CALL.findall(text):
        if command.strip("'\"") in KEYLESS:
            continue
        found += 1
        assert re.match(r"KEYS\[\d+\]", key) or key.strip() in ALIASES, f"{command} on {key!r}"
    assert found
    for assigned in re.findall(r"\blocal current, previous(?:, \w+)? = ([^\n]+)", text):
        assert re.match(r"KEYS\[\d+\], KEYS\[\d+\]", assigned)


@pytest.mark.parametrize("name", SCRIPTS)
def test_helpers_that_take_a_key_are_given_declared_ones_only(name: str) -> None:
    text = source(name)
    for helper, argument in re.findall(r"\b(hmget|counters)\(([^,]+),", text):
        assert re.match(r"KEYS\[\d+\]$|current$|previous$|key$", argument.strip()), f"{helper}({argument})"
    for argument in re.findall(r"\bbulk\('[A-Z]+', ([^,]+),", text):
        assert re.match(r"KEYS\[\d+\]$|current$|previous$|key$", argument.strip()), argument


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_uses_what_fakeredis_has_too(name: str) -> None:
    text = source(name)
    assert not re.search(r"\b(bit|cmsgpack|struct)\.|sha1hex|redis\.(setresp|breakpoint|replicate_commands|acl_check_cmd)", text)
    assert not re.search(r"\b(KEYS|SCAN|FLUSHALL|FLUSHDB|EVAL|RANDOMKEY)'", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_header_lists_keys_arguments_and_reply(name: str) -> None:
    head = resources.files("inventory_sdk.stock").joinpath("lua", name).read_text(encoding="utf-8").split("\n\n")[0:2]
    text = "\n".join(head)
    assert "-- KEYS" in text
    assert "-- ARGV" in text or "ARGV" not in source(name)
    assert "-- Reply" in text
    used = {int(number) for number in re.findall(r"KEYS\[(\d+)\]", source(name))}
    listed = re.search(r"-- KEYS([^\n]*)", text)
    assert listed
    declared = {int(number) for number in re.findall(r"(?:^|\s)(\d+) \w", listed.group(1))}
    assert used <= declared, used - declared


def test_the_batch_script_decides_every_kind_that_redis_has() -> None:
    decided = set(re.findall(r"decide\.(\w+)\b", source("batch.lua")))
    through_the_ledger = {Kind.RESTOCK, Kind.TAKE_BACK, Kind.OPEN}
    by_other_names = {Kind.REACQUIRE, Kind.TOMBSTONE}  # what a confirm or a release may become
    of_calls_that_span = {"follow", "abort"}  # journaled as confirm, release, expire, adjust and tombstone
    assert decided == {str(kind) for kind in Kind} - through_the_ledger - by_other_names | of_calls_that_span


def test_every_refusal_of_the_script_has_a_code_and_a_reason() -> None:
    codes = {int(code) for code in re.findall(r"(?:return|or) \{(\d+)[,}]", source("batch.lua"))}
    assert codes == {*range(1, 16), batch.AWAY}
    assert set(batch._REASONS) == codes - {batch.REPLAY}


@pytest.mark.parametrize("partitions", [1, 4, 16])
async def test_all_keys_of_a_partition_carry_its_one_hash_tag(namespace: str, partitions: int) -> None:
    async with shop_on("fakeredis", namespace, {"a": 5}, partitions=partitions) as shop:
        shop.ledger.stocked("m2", a=5)
        await shop.stock.reserve(lines(a=1), operation_id="{evil}:{t:3}")
        await shop.stock.deduct(lines(a=1), merchant="m2")
        await shop.engine.upkeep.heartbeat(0, "w1")
        await shop.engine.upkeep.rotate(0)
        tags = {f"{{{namespace}:{number}}}:" for number in range(partitions)}
        keys = [key.decode() for key in await shop.client.keys("*")]
        assert keys
        assert {f"{key.partition('}')[0]}}}:" for key in keys} == tags
        assert {key.partition("}:")[2] for key in keys} <= {*KEY_NAMES, "worker"}


def test_the_partition_of_a_merchant_is_its_crc32_in_any_process_and_language() -> None:
    assert partition_of("123456789", 16) == 0xCBF43926 % 16  # the check value of CRC-32/ISO-HDLC
    assert partition_of("123456789", 1000) == 0xCBF43926 % 1000
    assert partition_of("123456789", 1) == 0


async def test_a_script_that_the_server_forgot_is_sent_again(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 5}) as shop:
        await script_flushed(shop)


async def script_flushed(shop: Shop) -> None:
    first = await shop.stock.deduct(lines(a=1), operation_id="o1")
    await shop.client.script_flush()
    assert (await shop.stock.deduct(lines(a=1), operation_id="o1")).positions == first.positions
    await shop.client.script_flush()
    assert not (await shop.stock.deduct(lines(a=1))).replayed
    assert await shop.counters("a") == (3, 0)


@pytest.mark.parametrize("server", SERVERS)
async def test_a_sale_alone_in_its_batch_does_what_it_does_in_company(server: str, namespace: str) -> None:
    seed = int(os.environ.get("INVENTORY_TEST_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"INVENTORY_TEST_SEED={seed}")  # noqa: T201 - shown with a failure
    dice = random.Random(seed)
    company: list[Any] = ["extend", key_of(MERCHANT, "x"), "", [], "", key_of(MERCHANT, "nobody"), 1000, "", "", ""]
    stocked = {"a": 400, "b": 3, "none": 0, "frozen": 400}
    async with shop_on(server, f"{namespace}a", stocked) as alone, shop_on(server, f"{namespace}b", stocked) as together:
        for number in range(120):
            if number == 100:
                for shop in (alone, together):
                    await shop.client.hset(shop.key("frozen"), key_of(MERCHANT, "frozen"), "1-1")
            if number == 50:
                for shop in (alone, together):
                    await shop.client.hset(shop.key("meta"), "window", "1")
            flat = [key_of(MERCHANT, dice.choice(["a", "a", "a", "b", "none", "frozen", "frozen", "unloaded"])), dice.randint(1, 2)]
            key = key_of(MERCHANT, f"o{dice.randrange(90) if number < 100 else number}")
            order, extra = dice.choice(["", "order 7"]), dice.choice(["", '{"reason":"gift"}'])
            operation = ["deduct", key, fingerprint(Kind.DEDUCT, "", flat), flat, order, "", 0, extra, "", ""]
            answer = await alone.run([*operation[:3], list(flat), *operation[4:]])
            beside = await together.run(operation, company)
            assert answer[0] == beside[0], operation
            assert beside[1] == [batch.NOT_FOUND]
        assert _nameless(await alone.snapshot(without=["meta"])) == _nameless(await together.snapshot(without=["meta"]))
        counts = [await shop.client.hget(shop.key("meta"), "seq") for shop in (alone, together)]
        assert counts[0] == counts[1]


def _nameless(snapshot: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two partitions that did the same: the name, the nonces, the time of day."""
    text = {key.partition("}")[2]: repr(value) for key, value in snapshot.items()}
    return {key: re.sub(r'"n":"\w+","t":\d+', "", value) for key, value in text.items()}
