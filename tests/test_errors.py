from __future__ import annotations

import pytest

from eamdeploy import errors
from eamdeploy.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    EamDeployError,
    EngineError,
    ExitCode,
    MissingDependency,
    ParityError,
    UnsupportedGraph,
    conversion_packages,
    host_packages,
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("x is wrong"), "x is wrong"),
        (ConfigError("x is wrong", hint="Try y."), "x is wrong. Try y."),
        (ConfigError("x", expected=0, got=None), "x; expected 0"),
        (ConfigError("x", expected=[1], got=0), "x; expected [1]; got 0"),
        (ConfigError("x", got="", hint="Try y."), "x; got . Try y."),
    ],
)
def test_message_has_its_parts_in_order_and_zero_counts(error: EamDeployError, message: str) -> None:
    assert str(error) == message


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ConfigError, 2),
        (CheckpointError, 2),
        (UnsupportedGraph, 2),
        (EngineError, 2),
        (ParityError, 3),
        (MissingDependency, 4),
        (DeviceError, 4),
    ],
)
def test_every_kind_has_its_exit_code(kind: type[EamDeployError], code: int) -> None:
    assert kind("x").exit_code == code
    assert issubclass(kind, EamDeployError)


def test_no_kind_is_left_out() -> None:
    kinds = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, EamDeployError)}
    assert len(kinds) == 1 + 7
    assert {int(code) for code in ExitCode} == {0, 1, 2, 3, 4}


def test_missing_package_of_the_host_is_named_with_what_needs_it() -> None:
    message = r"freezing needs the package nosuchpackage.*eamdeploy\[host\]"
    with pytest.raises(MissingDependency, match=message) as err, host_packages("freezing"):
        import nosuchpackage.part  # type: ignore[import-not-found]  # noqa: F401
    assert isinstance(err.value.__cause__, ModuleNotFoundError)


def test_missing_package_of_the_conversion_is_named_with_how_a_board_gets_it() -> None:
    message = r"^converting needs the package nosuchpackage.*\. Get it with: pip install onnx onnx-graphsurgeon$"
    with pytest.raises(MissingDependency, match=message), conversion_packages("converting"):
        import nosuchpackage  # noqa: F401


def test_our_own_missing_module_and_other_errors_stay_bugs() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"eamdeploy\.nosuch"), host_packages("freezing"):
        import eamdeploy.nosuch  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name"), host_packages("freezing"):
        from eamdeploy.errors import NoSuchName  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="by hand"), host_packages("freezing"):
        raise ModuleNotFoundError("by hand")


def test_an_endless_part_of_a_message_loses_its_middle() -> None:
    """zipfile quotes a whole archive."""
    message = str(ConfigError("a" * 5000 + "z", expected="b" * 1000, got=["c" * 100] * 1000, hint="Do this."))
    assert len(message) < 3100
    assert message.startswith("aaaa") and "a … a" in message and "z; expected b" in message
    assert message.endswith("'cccc" + "c" * 96 + "']. Do this.")
