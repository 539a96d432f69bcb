from __future__ import annotations

import re
from pathlib import Path

import pytest
from html_page import Page
from report_records import (
    DEPTH,
    DRIFT,
    HEADS,
    MODEL,
    UNSTEADY,
    card,
    device_build,
    engine,
    evaluation,
    freezing,
    latency,
    machine,
    manifest,
    power,
    profile,
    remote_profiles,
    rich_records,
    write_all,
)

import eamdeploy
from eamdeploy.artifacts.card import RANDOM_WARNING
from eamdeploy.artifacts.records import Record
from eamdeploy.artifacts.run_state import RunState
from eamdeploy.engines.manifest import Manifest
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.profile import Profile
from eamdeploy.reporting import numbers
from eamdeploy.stages.report import report

STYLE = (Path(eamdeploy.__file__).parent / "reporting" / "write" / "page.css").read_text()


def page_of(tmp_path: Path, records: dict[str, Record], title: str | None = None) -> Page:
    files = write_all(tmp_path / "records", records)
    report(files, tmp_path / "report.html", title=title)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.faults == []
    return page


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(tmp_path_factory.mktemp("rich"), rich_records())


# --- the page itself -------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_needs_nothing_but_itself(rich: Page) -> None:
    assert rich.faults == [] and rich.unknown_labels() == []
    assert not {"script", "img", "iframe", "object", "embed", "video", "audio", "form"} & set(rich.tags)
    assert {address for address in rich.addresses if address != "#flake"} == {"data:,"}
    assert not re.search(r"url\(|@import|https?:", STYLE)


def test_the_parser_sees_what_is_not_well_formed() -> None:
    assert Page("<p><b></p>").faults[0] == "</p> closes b"
    assert Page("<p id=a></p><p id=a></p>").faults == ["id a is there twice"]
    assert Page("<div>").faults == ["<div> is never closed"]
    assert Page("<div/>").faults == ["<div/> is no empty element of HTML"]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    files = write_all(tmp_path / "records", rich_records())
    for name in ("a", "b"):
        report(files, tmp_path / f"{name}.html", markdown=tmp_path / f"{name}.md")
    for suffix in ("html", "md"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_names_that_look_like_markup_are_text(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">&amp;{{ 7*7 }}</svg></style>'
    frozen = freezing(heads={f"{evil}.attn": [0]}, scores={f"{evil}.attn": [0.5, 0.25], "b.attn": [0.1, 0.2]})
    evil_card = card(frozen, timm_model=evil, class_names=[evil] * 10, weights="random")
    records = {
        "m.json": manifest(
            f"{evil}.plan", evil_card, backend="trt", device=device_build(layer_ms={evil: 1.0}, gpu=evil)
        ),
        "p.json": profile(
            [engine(evil, evil_card, 2.0, 1.5, latency=latency(2, warning=evil), settings={evil: evil})],
            engine(f"base {evil}", card(timm_model=evil), 3.0),
            machine=machine(cpu=evil, governor=evil, versions={evil: evil}),
        ),
        "e.json": evaluation(evil, f"base {evil}", images=evil, n_skipped=1, skipped=[evil]),
    }
    page = page_of(tmp_path, records, title=evil)
    assert page.texts["h1"] == [evil] and page.texts["title"][0] == evil
    assert "img" not in page.tags
    assert page.words.count(evil) > 20


# --- what is on it ---------------------------------------------------------------------------------------------------


def shown(page: Page, text: str) -> bool:
    return " ".join(text.split()) in page.words


def test_the_first_thing_is_what_was_frozen_what_it_cost_and_what_it_gained(tmp_path: Path) -> None:
    frozen, twin = card(freezing()), card()
    page = page_of(
        tmp_path,
        {
            "profile.json": profile([engine("x.ort.onnx", frozen, 13.7, 1.071)], engine("b.ort.onnx", twin, 14.7)),
            "x.json": manifest("x.ort.onnx", frozen),
            "evaluation.json": evaluation("x.ort.onnx", "b.ort.onnx"),
        },
    )
    glance = page.words.partition("Attention heads")[0]
    for text in (
        *(f"{MODEL} Frozen 14 of {DEPTH * HEADS} heads", "sparsity 19.4 % of all", "4-bit codes, squared"),
        *("Cost 72.2 → 71.9 %", "top-1 of 500 images", "−0.30 points", "agreement with b.ort.onnx 93.8 %"),
        *("Gain 1.071× faster", "95 % interval 1.061× – 1.081×", "p50 14.7 ms → 13.7 ms"),
        *("file 22.9 MB → 22.9 MB", "peak memory 127 MB → 127 MB (±0.0 %)"),
    ):
        assert text in glance, text
    assert "Before you rely" not in page.words


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.071, "faster"), (1.009, "no difference"), (0.995, "no difference"), (0.98, "slower")]
)
def test_a_speed_up_within_the_noise_is_not_called_one(tmp_path: Path, ratio: float, verdict: str) -> None:
    frozen = card(freezing())
    page = page_of(
        tmp_path, {"p.json": profile([engine("x.ort.onnx", frozen, 13.7, ratio)], engine("b", card(), 14.7))}
    )
    assert shown(page, f"Gain {ratio:.3f}× {verdict}")


def test_every_number_of_every_profile_is_there(rich: Page) -> None:
    for record in rich_records().values():
        if not isinstance(record, Profile):
            continue
        everyone = [*record.engines, *([record.baseline] if record.baseline else [])]
        for item in everyone:
            times, memory, speed = item.latency, item.memory, item.speed_up
            cells = [times.p50_ms, times.mean_ms, times.min_ms, times.p5_ms, times.p25_ms, times.p75_ms]
            cells += [times.p90_ms, times.p95_ms, times.p99_ms]
            row = " ".join(map(numbers.significant, cells))
            more = f"{numbers.rate(times.throughput_images_per_s)} {times.variation_percent:.1f} % {times.runs:,}"
            assert shown(rich, f"{row} {more}"), item.engine
            if memory is not None:
                sizes = (
                    memory.engine_bytes,
                    memory.peak_rss_bytes,
                    memory.engine_peak_rss_bytes,
                    memory.rss_bytes,
                    memory.pss_bytes or 0,
                    *(memory.device_memory_bytes, memory.available_drop_bytes, memory.nvmap_bytes),
                )
                assert shown(rich, " ".join(numbers.size(each) for each in sizes if each is not None))
            if speed is not None:
                assert shown(rich, f"{speed.verdict} {speed.median:.3f}× {speed.low:.3f}× – {speed.high:.3f}×")
                assert shown(rich, f"{speed.p25:.3f}× – {speed.p75:.3f}× {speed.p5:.3f}× – {speed.p95:.3f}× 1,234 5")
        for text in (
            record.machine.cpu,
            record.machine.system,
            record.machine.architecture,
            record.machine.measured_at,
        ):
            assert shown(rich, text)
        for name, version in record.machine.versions.items():
            assert name in rich.words and version in rich.words


def test_every_number_of_every_evaluation_is_there(rich: Page) -> None:
    for record in rich_records().values():
        if isinstance(record, EvaluationReport):
            pairs = (record.top1, record.reference_top1, record.top5, record.reference_top5, record.agreement)
            for value in pairs:
                assert value is None or shown(rich, f"{value:.1f} %")
            assert shown(rich, f"{record.n_images} of {record.images}")
            assert shown(rich, f"{record.agreement:.1f} % {record.kl:.3g}") and shown(
                rich, f"{record.max_abs_logit_diff:.3g}"
            )


def test_every_manifest_tells_how_its_engine_was_built(rich: Page) -> None:
    for record in rich_records().values():
        if isinstance(record, Manifest):
            assert record.engine in rich.texts["h3"][-12:] or any(record.engine in text for text in rich.texts["h3"])
            assert shown(rich, numbers.size(record.engine_bytes)) and shown(rich, record.created)
            assert all(shown(rich, f"{key}={value}") for key, value in record.settings.items())
    build = device_build()
    times = build.layer_ms
    assert times is not None and build.engine_layers is not None
    slowest = sorted(times, key=lambda name: -times[name])
    rows = rich.texts["th"]
    assert all(name in rows for name in slowest[:15]) and not any(name in rows for name in slowest[15:])
    assert [rows.index(name) for name in slowest[:15]] == sorted(rows.index(name) for name in slowest[:15])
    for text in (
        *(
            "model.plan the slowest 15 of 40 layers, timed when it was built, on Orin",
            "TensorRT 10.3.0",
            "Orin, compute capability 8.7",
            "FP16",
            "9.44 MB",
        ),
        *("frozen maps as INT8; LayerNorm in FP32", "40, with fused attention: 1", "_gemm_mha_v2_myl0_7"),
        *("blocks.1.attn.map __myl_DequMul_myl0_12 Int8", "blocks.3.attn.map in no layer of its own"),
        *("base.plan: 24.1 MB, 44 layers", "model.plan.log"),
    ):
        assert shown(rich, text), text


def test_what_only_a_board_tells_is_there(rich: Page) -> None:
    for text in (
        "base.plan yes, with the copies – 2.62 ms – 0.213 ms 100",
        "model.plan no 0.0610 ms 2.20 ms 0.00710 ms 0.213 ms 100",
        "model.plan 2 732 424 2.73 ms 3.63 ms 4,321 3.00 s",
        "model.plan 312 ms 27.5 ms 4.39 ms",
        "model.plan VDD_IN (tegrastats) 4.40 W 8.10 W 18.7 mJ 8.55 mJ 433 10.0 s 97 2",
        "half.plan VDD_IN (tegrastats) 4.40 W 4.39 W 12.7 mJ −0.0290 mJ",
        "model.plan 8.10 W 4.21 W 1.70 W",
        "model.plan 3.91 GB 612 MB",
        "device NVIDIA Jetson Orin Nano (made up) software JetPack 6.2, L4T 36.4.3 power mode 15W (mode 0)",
        "temperatures cpu-thermal 48 → 71 °C, gpu-thermal 47 → 73 °C clocks CPU0–5 729–1510 → 1510 MHz, GPU 612 MHz",
        "clocks locked no throttling none → cpu-throttle-alert is at 1 of 1",
        "model.plan the slowest 15 of 20 layers, timed by profile, on NVIDIA Jetson Orin Nano (made up), 6 cores",
    ):
        assert shown(rich, text), text
    timed = [text.partition(" timed ")[2].partition(",")[0] for text in rich.texts["h3"] if "model.plan the" in text]
    assert timed == ["when it was built", "by profile"]


def test_energy_is_among_what_was_gained(rich: Page) -> None:
    glance = rich.words.partition("Before you rely")[0]
    assert "p50 2.73 ms → 2.31 ms energy per image 23.5 mJ → 18.7 mJ (−20.3 %) file" in glance


def test_without_a_sensor_there_is_no_power(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"p.json": profile([engine("x", None, 2.0)])})
    assert "Power and energy" not in page.texts["h2"] and "energy" not in page.words


def test_a_sensor_that_knows_no_total_gives_power_by_rail_only(tmp_path: Path) -> None:
    unknown = dict.fromkeys(("idle_mw", "mean_mw", "energy_mj_per_image", "energy_above_idle_mj_per_image"))
    used = power(8000, 2.0, total_rails=[]).model_copy(update=unknown)
    page = page_of(tmp_path, {"p.json": profile([engine("x", None, 2.0, power=used)])})
    assert shown(page, "x not known (tegrastats) 500 10.0 s 97 2") and shown(page, "x 8.00 W 4.16 W 1.68 W")
    assert "Mean power" not in page.texts["figcaption"] and "energy per image" not in page.words


def test_machines_of_one_file_stand_side_by_side(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"boards.json": remote_profiles()})
    for target, board, p50 in (
        ("ssh://nvidia@orin.lan", "NVIDIA Jetson Orin Nano (made up)", "2.73 ms → 2.31 ms"),
        ("ssh://agx.lan:2222", "NVIDIA Jetson AGX Orin (made up)", "1.09 ms → 0.924 ms"),
    ):
        place = f"{target} ({board}, 6 cores)"
        assert page.texts["h3"].count(place) == 3  # latency, power, memory
        assert shown(page, f"model.plan on {place} 95 % interval 1.170× – 1.190× p50 {p50}")
    assert page.texts["h1"] == [MODEL] and [text for text in page.texts["li"] if "profiles of machines" in text]
    assert shown(page, "boards.json: a machine gave no figures: ssh://pi5 can't be reached")


def test_every_warning_is_there_before_any_detail(rich: Page) -> None:
    before = rich.words.partition("Attention heads")[0]
    for warning in (
        f"model.plan: {RANDOM_WARNING}",
        "half.ort.onnx: its parity was not checked",
        f"half.ort.onnx on Made-up CPU: {UNSTEADY}",
        "NVIDIA Jetson Orin Nano (made up): slowed down at the end of the measurement: cpu-throttle-alert",
        f"half.plan on NVIDIA Jetson Orin Nano (made up): {DRIFT}",
        "2 images could not be decoded and are left out of its accuracy: a/broken.png, b/<b>worse</b>.png",
    ):
        assert warning in before, warning


def test_variants_of_a_model_are_told_apart(rich: Page) -> None:
    titles = [f"{MODEL} at {percent} sparsity" for percent in ("19.4 %", "50.0 %")]
    assert [text for text in rich.texts["h2"] if MODEL in text] == titles
    assert rich.texts["h1"] == [MODEL]
    assert shown(rich, "model.ort.onnx on Made-up CPU, 4 cores") and shown(rich, "model.plan on NVIDIA Jetson")


def test_frozen_heads_are_marked_and_every_score_has_a_colour(tmp_path: Path) -> None:
    frozen = freezing()
    write_all(tmp_path, {"x.json": manifest("x.ort.onnx", card(frozen))})
    report([tmp_path / "x.json"], tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    cells = re.findall(r'<g class="cell (\S+) (\S+)"><title>([^<]+)</title>', text)
    assert len(cells) == DEPTH * HEADS
    marked = {told.partition(":")[0] for _, state, told in cells if state == "whole"}
    assert marked == {
        f"{path.removesuffix('.attn')}, head {head}" for path, its in frozen.heads.items() for head in its
    }
    assert {colour for colour, _, _ in cells} >= {"s0", "s8"}
    assert text.count('<use href="#flake"') == len(marked) + 1  # and one in the legend


def test_shares_of_an_analysis_are_drawn(rich: Page) -> None:
    assert shown(rich, "entropy of every head, layer by layer, by an analysis")
    told = [text for text in rich.texts["title"] if text.endswith("% frozen")]
    assert [re.sub(r": \S+,", ":", text) for text in told] == 2 * [
        "blocks.2, head 0: 25.0 % frozen",
        "blocks.7, head 5: 75.0 % frozen",
    ]


def test_a_report_of_one_record_says_what_is_missing(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"e.json": evaluation("x.ort.onnx", None, None)})
    assert shown(page, "Frozen No record says what is frozen here.")
    assert shown(page, "neither labels nor a reference") and shown(page, "Gain Speed was not measured here.")
    assert page.texts["h1"] == ["x.ort.onnx"]
    assert "Latency" not in page.texts["h2"]


def test_an_unfrozen_model_is_not_said_to_be_unknown(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"p.json": profile([engine("x", card(), 2.0), engine("y", None, 2.0)])})
    glance = page.words.partition("Latency")[0]
    assert "x Frozen Nothing is frozen." in glance and "y Frozen No record says what is frozen here." in glance
    assert "Gain 2.00 ms p50 of one inference, without a baseline" in glance


def test_an_export_that_was_timed_is_a_gain(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"x.json": rich_records()["export.json"]})
    assert shown(page, "Gain 1.070× faster speed of the unfrozen twin at export on Made-up CPU, 4 cores")
    assert shown(page, "1234 nodes by torch's dynamo exporter, 432 after freeze_heads")


def test_an_analysis_alone_says_what_would_be_frozen(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"a.json": rich_records()["analysis.json"]})
    assert shown(page, "Frozen 3 of 72 heads would have frozen rows")
    assert shown(page, "29.8 % of all attention entries (30.0 % asked for)")


def test_a_run_that_has_written_nothing_yet_has_a_page_too(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"run.json": RunState()})
    assert page.texts["h1"] == ["eamdeploy"] and shown(page, "eamdeploy run CONFIG.toml")


def test_the_title_can_be_given(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"p.json": profile([engine("x", card(freezing()), 2.0)])}, title="Board & <co>")
    assert page.texts["h1"] == ["Board & <co>"] and MODEL in page.texts["h2"]


# --- its colours -----------------------------------------------------------------------------------------------------


def themes() -> dict[str, dict[str, str]]:
    """The style's colours by name, in light and in dark."""
    screen = STYLE.partition("@media print")[0].split("@media screen", 1)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in screen)
    assert len(dark) >= len(light) > 20
    return {"light": light, "dark": {name: dark[name] for name in light}}


def luminance(colour: str) -> float:
    """Source: WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(theme: str) -> None:
    colours = themes()[theme]
    text = [
        *((name, ground) for name in ("ink", "muted") for ground in ("page", "surface")),
        *(("caution-ink", "caution-page"), ("good", "good-soft"), ("bad", "bad-soft"), ("ink", "even-soft")),
        *(("on-low", f"s{step}") for step in range(5)),
        *(("on-high", f"s{step}") for step in range(5, 9)),
    ]
    graphics = [("main", "surface"), ("base", "surface"), ("main", "main-soft"), ("base", "base-soft")]
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for pairs, least in ((text, 4.5), (graphics, 3.0)):
        weak = {pair: ratio for pair in pairs if (ratio := contrast(*(colours[name] for name in pair))) < least}
        assert weak == {}


def test_the_colours_of_scores_go_one_way() -> None:
    for colours in themes().values():
        steps = [luminance(colours[f"s{step}"]) for step in range(9)]
        assert steps in (sorted(steps), sorted(steps, reverse=True))
