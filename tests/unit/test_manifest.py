"""App and pool manifests: every bad input is one error that names the field, the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.manifest import AppManifest, PoolManifest, parse_manifest, read_manifest, spec_digest

GOOD = 'name = "digits"\nmodel = "digits-model"\n'


def refused(cls: type, text: str, *, yaml_syntax: bool = False) -> FalError:
    with pytest.raises(FalError) as caught:
        parse_manifest(cls, text, source="m.toml", yaml_syntax=yaml_syntax)
    assert caught.value.code is Code.INVALID
    assert caught.value.remedy
    return caught.value


def test_defaults_are_fals() -> None:
    app = parse_manifest(AppManifest, GOOD, source="m.toml", yaml_syntax=False)
    assert (app.keep_alive, app.min_concurrency, app.max_concurrency, app.max_multiplexing) == (60.0, 0, 2, 1)
    assert (app.request_timeout, app.startup_timeout, app.scaling_delay) == (3600.0, 600.0, 0.0)
    assert app.id == "default/digits"
    assert app.to_proto().model == "default/digits-model"


def test_toml_and_yaml_say_the_same() -> None:
    toml = parse_manifest(AppManifest, GOOD + "num_gpus = 2\n", source="a.toml", yaml_syntax=False)
    yaml = parse_manifest(
        AppManifest, "name: digits\nmodel: digits-model\nnum_gpus: 2\n", source="a.yaml", yaml_syntax=True
    )
    assert toml == yaml


def test_message_round_trip_is_exact_and_checked_again() -> None:
    app = parse_manifest(
        AppManifest,
        GOOD + 'machine_type = ["H100-80GB"]\nenv = {A = "1"}\nlabels = {rack = "r1"}\n[resources]\ncpu = 1.5\n',
        source="m.toml",
        yaml_syntax=False,
    )
    spec = app.to_proto()
    assert AppManifest.from_proto(app.id, spec).to_proto() == spec
    spec.scaling.min_concurrency = 99
    with pytest.raises(FalError, match="min_concurrency = 99"):
        AppManifest.from_proto(app.id, spec)


def test_an_app_that_streams_says_so_and_all_others_keep_their_digest() -> None:
    plain = parse_manifest(AppManifest, GOOD, source="m", yaml_syntax=False)
    assert spec_digest(plain.to_proto()) == "5024896a2e3992943e6db17d36b1adc91c3d6ee86b995b1b8ecf66af8ba6c7fb"  # 0.1's
    streams = GOOD + "stream_weights = true\nallow_provisional = true\n"
    app = parse_manifest(AppManifest, streams, source="m", yaml_syntax=False)
    spec = app.to_proto()
    assert (spec.stream_weights, spec.allow_provisional) == (True, True)
    assert AppManifest.from_proto(app.id, spec) == app.model_copy(update={"model": "default/digits-model"})
    error = refused(AppManifest, GOOD + "allow_provisional = true\n")
    assert "stream_weights = true" in str(error)


def test_digest_does_not_depend_on_map_order() -> None:
    one = parse_manifest(AppManifest, GOOD + 'env = {A = "1", B = "2"}\n', source="m", yaml_syntax=False)
    two = parse_manifest(AppManifest, GOOD + 'env = {B = "2", A = "1"}\n', source="m", yaml_syntax=False)
    assert spec_digest(one.to_proto()) == spec_digest(two.to_proto())


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        (GOOD + 'modle = "x"\n', "modle", "Did you mean 'model'"),
        ('name = "Digits"\nmodel = "m"\n', "name", "a-z"),
        (GOOD + 'num_gpus = "two"\n', "num_gpus", "'two'"),
        (GOOD + "num_gpus = 99\n", "num_gpus", "99"),
        (GOOD + "num_gpus = true\n", "num_gpus", "True"),
        (GOOD + 'image = "docker.io/library/ubuntu:24.04"\n', "image", "not a name"),
        (GOOD + 'image = "other/ubuntu"\n', "", "another team"),
        (GOOD + "port = 8000\nsocket = 'a.sock'\n", "", "exclude"),
        (GOOD + "port = 8000\nnetwork = 'host'\n", "", "namespace"),
        (GOOD + 'egress_allow = ["10.0.0.0/8"]\n', "", "egress"),
        (GOOD + 'network = "egress"\negress_deny = ["10.0.0.1/8"]\n', "egress_deny", "host bits"),
        (GOOD + 'cuda_version_min = "twelve"\n', "cuda_version_min", "550.54"),
        (GOOD + 'secrets = ["a", "a"]\n', "", "twice"),
        (GOOD + 'network = "bridge"\n', "network", "egress"),
        (GOOD + "[resources]\ncpus = 1\n", "resources.cpus", "Did you mean 'cpu'"),
        (GOOD + "[env]\n1BAD = 'x'\n", "env", "1BAD"),
        (GOOD + "min_concurrency = 3\n", "", "min_concurrency = 3 is above max_concurrency = 2"),
        ('name = "d"\n', "", "model is missing"),
        ('name = "d"\nmodel = "other/m"\n', "", "another team"),
        ('name = "d"\nmodel = "m"\nmachine_type = ["A", "A"]\n', "", "twice"),
        (GOOD + 'share_group = "A B"\n', "share_group", "share_group = 'A B' is refused: not a name"),
        (GOOD + 'labels = {"a b" = "x"}\n', "labels", "no name of a label"),
        (GOOD + 'labels = {"" = "x"}\n', "labels", "no name of a label"),
        (GOOD + '[placement]\nlabels_preferred = {"a-" = "x"}\n', "placement.labels_preferred", "no name of a label"),
        (GOOD + '[placement]\naffinity = ["b", "c"]\nanti_affinity = ["default/b"]\n', "", "both name 'default/b'"),
        (GOOD + '[placement]\naffinity = ["digits"]\n', "", "first runner has no place"),
        ("name = \n", "file", "cannot be parsed"),
        ('model = "m"\n', "name", "missing"),
    ],
)
def test_bad_app_manifests(text: str, field: str, words: str) -> None:
    error = refused(AppManifest, text)
    assert words in str(error)
    assert error.field.startswith(field)


def test_yaml_that_is_not_a_table() -> None:
    assert "holds no table" in str(refused(AppManifest, "- a\n- b\n", yaml_syntax=True))


def test_yaml_cannot_construct_objects() -> None:
    refused(AppManifest, "!!python/object/apply:os.system ['true']", yaml_syntax=True)


def test_pool_sizes_and_prices() -> None:
    pool = parse_manifest(
        PoolManifest, 'name = "east"\ncache_size = "2TiB"\ngpu_hour_price = 2.5\n', source="p.toml", yaml_syntax=False
    )
    message = pool.to_proto()
    assert (message.cache_bytes, message.gpu_hour_price_micros) == (2 << 40, 2_500_000)
    assert PoolManifest.from_proto(message).to_proto() == message


def test_pool_with_a_size_that_is_none() -> None:
    assert "2 elephants" in str(refused(PoolManifest, 'name = "p"\ncache_size = "2 elephants"\n'))


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FalError, match="cannot be read"):
        read_manifest(AppManifest, tmp_path / "absent.toml")
    odd = tmp_path / "app.json"
    odd.write_text("{}")
    with pytest.raises(FalError, match="neither TOML nor YAML"):
        read_manifest(AppManifest, odd)
    huge = tmp_path / "app.toml"
    huge.write_text("# " + "x" * (300 << 10))
    with pytest.raises(FalError, match="too large"):
        read_manifest(AppManifest, huge)
