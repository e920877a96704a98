# SPDX-License-Identifier: Apache-2.0
"""The lint of configurations: known ways out of an expression are refused, and so is whatever chance makes of them."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from monai.bundle import ConfigParser, ReferenceResolver

from tests import commands
from tests.bundle_tools import CONFIGS, WORKFLOWS, label, read, signature_faults, strings
from tests.conftest import ROOT
from tests.properties import examples
from tools.bundle_checks.expressions import (
    ABSENT,
    ALLOWED_ATTRIBUTES,
    ALLOWED_NAMES,
    IMPORTS,
    ON_PATH,
    check_files,
    expression_faults,
    macro_faults,
)
from tools.bundle_checks.targets import target_faults

ESCAPES = [
    # the interpreter by its dunders
    "@network.__class__.__mro__", "len.__self__.eval('1')", "torch.__builtins__", "@a.to.__globals__",
    "max.__call__", "__import__('os').system('true')", "__local_refs", "__builtins__",
    # functions that run code or reach attributes by text
    "eval('1')", "exec('1')", "compile('1', '', 'eval')", "getattr(@a, 'b')", "setattr(@a, 'b', 1)", "vars(@a)",
    "globals()", "locals()", "dir()", "open('x').read()", "input()", "breakpoint()", "print(1)", "type(@a)",
    "map(@a, [1])", "min(1, 2)", "str(@a)", "help()",
    # other forms of code
    "lambda: 1", "(lambda: 1)()", "[x for x in @a]", "{x for x in @a}", "{x: 1 for x in @a}", "(x for x in @a)",
    "(y := 1)", "f'{@a}'", "f'{1!r:>{2}}'", "@a[0]", "@a[0:1]", "'a'[0]", "{'a': 1}", "{1}", "(1, 2)", "@a and @b",
    "@a or @b", "@a if @b else lambda: 1", "await @a", "yield 1", "not 1 in [1]", "1 < 2", "@a ** 9", "@a % @b",
    "'%s' % @a", "'a' 'b' * 9", "~1", "@a - 1", "@a | @b", "@a @ @b", "1; import os", "import subprocess",
    "import os, subprocess", "from os import system", "import os as torch", "import  os", "x = 1", "del @a", "pass",
    "max(1, 2, key=eval)", "len(*[eval])", "max(**@a)", "bool(x=1)",
    # chains on what a function returned, or that begin like an allowed name
    "torch.load('x')", "torch.hub.load('a', 'b')", "torch.device(@d).type.format(@a)", "torch.device(@d)(1)",
    "torch.device.mro()", "torch.cuda.is_available.__globals__", "torch.devices('x')", "torch.device_(1)",
    "os.path.abspath('x').format(@a)", "os.path.abspath('{0.x}').format_map(@a)", "os.path.os.system('true')",
    "os.path.abspath.f_globals", "os.path.genericpath.os.system('x')", "os.system('true')", "os.popen('x')",
    "os.environ", "os", "os.path", "torch", "monai", "monai.handlers", "monai.handlers.from_engine(@a).gi_frame",
    "monai.data.utils.os.system('x')", "monai.data.utils.pickle_hashing.f(1)", "monai.utils.optional_import('os')",
    "subprocess.run('x')", "sys.modules", "np.load('x')", "shutil.rmtree('x')", "max(@a).mro()", "bool.mro()",
    "len('x').real", "('a' + 'b').join(@a)", "'{0.x}'.format(@a)", "[eval][0]('1')", "[len].pop()", "(@a).system('x')",
    "(@a if @b else @c).system('x')", "(-@a).system('x')",
    # what references lead to
    "@generator.gi_frame.f_builtins", "@function.func_globals", "@module.os.system('x')", "@a('x')", "(@a)('x')",
    "@a.to(@d)(@e)", "@a.run()()", "@trainer._process_function", "@a.system('x')", "@a.load_state_dict(@b)",
    "@a.eval().os", "@a.to(eval('1'))", "@a.to(@b.system('x'))",
    # references that MONAI replaces as text: inside of quotes, without id, relative to keys of any text, joined names
    "'@or'", "\"@a\" + 'x'", "'''@a'''", "b'@a'", "'a@'", "@", "@ + 1", "@1", "@-a", "@#a", "@##a", "@::a", "'%##a'",
    "%#a", "'%::'", "@a#", "@a##b", "@a::", "@a@b", "@a@b.to(1)", "len@a", "@a::b.os",
    "@a#b.system('x')", "ref_a + @a", "ref_a", "'ref_a'",
    # text as code
    "'ev' + 'al'('1')", "('ev' + 'al')('1')", "'os' + '.system'", "1 # os.system('x')", "1 #\n+ eval('1')",
    # letters that Python takes for others (NFKC)
    "ｅval('1')", "𝐞𝐯𝐚𝐥('1')", "ｏｓ.system('x')", "os.ｓystem('x')", "@network.＿＿class＿＿", "@a.＿_class__",
    "ºs.system('x')", "@a.𝓈ystem('x')", "ﬁlter(@a)",
    # what does not parse, or only just
    "", " ", "(", "'", "\\", "1\x00", "\x00", "\ud800", "'\ud800' + eval('1')", "(" * 30, "-" * 70 + "1",
    "\t1", "\f eval('1')", "a" * 200, "1\n", "\n1\neval('1')", "...", "@a if 1", "#", "#eval",
]  # fmt: skip
HARMLESS_AFTER_ALL = {"1\n", "...", "-" * 70 + "1"}


@pytest.mark.parametrize("code", sorted(set(ESCAPES) - HARMLESS_AFTER_ALL - {"'os' + '.system'"}), ids=ascii)
def test_known_ways_out_are_refused(code):
    assert expression_faults({"seed": f"${code}"}) != []


@pytest.mark.parametrize("place", [{"_desc_": "$eval('1')"}, {"a": {"_desc_": "$eval('1')", "x": 1}},
                                   {"a": {"_target_": "torch.nn.Identity", "_desc_": "$eval('1')"}},
                                   {"a": [[{"b": "$eval('1')"}]]}, {"a": {"_disabled_": "$eval('1')"}},
                                   {"a": {"_requires_": ["$eval('1')"]}}, {"+a#b::c": "$eval('1')"}])  # fmt: skip
def test_every_place_of_a_configuration_is_looked_at(place):
    assert any("eval is not allowed" in fault for fault in expression_faults(place))


def test_monai_runs_descriptions():
    """Why they are looked at."""
    parser = ConfigParser({"a": {"_target_": "torch.nn.Identity", "_desc_": "$[].append(1) or 1 / 0"}})
    with pytest.raises(RuntimeError, match="ConfigExpression"):
        parser.get_parsed_content("a")


@pytest.mark.parametrize("path", WORKFLOWS, ids=label)
def test_our_configurations_pass(path):
    config = read(path)
    assert expression_faults(config) + macro_faults(config) + target_faults(config) == []


# What chance makes

WORDS = st.sampled_from([
    *("@a", "@a#b", "@a::0", "@", "@#a", "%", "#", "::", "ref_a", "__local_refs", "__class__", "eval", "getattr"),
    *("os", ".", ".path.abspath", ".system", "torch", ".device", ".cuda.is_available", ".load", "len", "max", "bool"),
    *(".to", ".run", ".eval", ".type", ".names", ".gi_frame", "(", ")", "[", "]", "{", "}", "'", '"', "'''", ",", ":"),
    *(" ", "\n", "\\", "+", "-", "*", "*", "==", ">", ":=", "=", " if ", " else ", " not ", " for x in ", "lambda:"),
    *("f'", "b'", "1", "0x1", "1j", "None", "ｅval", "＿", "\x00", "monai.handlers.from_engine", "import os", ";"),
])  # fmt: skip
VALID = st.recursive(
    st.sampled_from(["@a", "@a#b", "1", "'x'", "None", "torch.bfloat16", "@a.ema_model", "eval", "'@a'", "os"]),
    lambda inner: st.one_of(
        st.builds("{} + {}".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("[{}, *{}]".format, inner, inner),
        st.builds("{}({})".format, st.sampled_from(["len", "max", "os.path.abspath", "@a.to", "@a", "eval"]), inner),
        st.builds("({}){}".format, inner, st.sampled_from([".to", ".run()", ".__class__", ".gi_frame", "[0]", "()"])),
        st.builds("not {}".format, inner),
        st.builds("{} == {}".format, inner, inner),
    ),
    max_leaves=4,
)
NAMES = {"__local_refs", *(name.split(".")[0] for name in ALLOWED_NAMES)}


def what_monai_runs(code: str) -> str:
    """The text that MONAI gives to `eval`, every reference found."""
    text = ConfigParser.resolve_relative_ids("place", f"${code}")
    return str(ReferenceResolver.update_refs_pattern(text, ReferenceResolver.match_refs_pattern(text)))[1:]


@examples(500)
@given(code=st.one_of(st.lists(WORDS, max_size=9).map("".join), VALID, VALID, st.text(max_size=12)))
@example(code="'@or'")
@example(code="@a@b")
@example(code="@a.to(@a#b).eval()")
def test_what_is_accepted_names_and_calls_nothing_else(code):
    """The judge here is the text that MONAI would run, taken apart without any of the lint's own steps."""
    if expression_faults({"seed": f"${code}"}) or code in (*IMPORTS, ON_PATH) or ABSENT.fullmatch(code):
        return
    forms = (ast.Lambda, ast.comprehension, ast.JoinedStr, ast.NamedExpr, ast.keyword, ast.Dict, ast.Await)
    for node in ast.walk(ast.parse(what_monai_runs(code).strip(), mode="eval")):
        assert not isinstance(node, forms)
        if isinstance(node, ast.Name):
            assert node.id in NAMES
        if isinstance(node, ast.Subscript):
            assert ast.unparse(node.value) == "__local_refs"
            assert isinstance(node.slice, ast.Constant)
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            assert node.attr in ALLOWED_ATTRIBUTES or any(f"{known}.".startswith(f"{name}.") for known in ALLOWED_NAMES)
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Attribute) or ast.unparse(node.func) in ALLOWED_NAMES


def test_chance_makes_some_that_are_accepted():
    """Else the property above would hold for a lint that refuses everything."""
    accepted = []

    @examples(150)
    @given(code=VALID)
    def collect(code):
        accepted.extend([] if expression_faults({"seed": f"${code}"}) else [code])

    collect()
    assert len(set(accepted)) >= 15


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False), st.text(max_size=8),
              st.sampled_from(["$1", "$eval('1')", "@a", "%a", "%b.json::c", "os.system", "$" + "(" * 40])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=4), st.sampled_from(["_target_", "_desc_", "a#_target_"])), inner,
                        max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip


@examples(150)
@given(config=JSON)
def test_any_json_is_judged_without_an_error(config):
    found = expression_faults(config) + macro_faults(config) + target_faults(config)
    code = [text for _, text in strings(config, descriptions=True) if text == "$eval('1')"]
    assert sum("eval is not allowed" in fault for fault in found) == len(code)


# Macros and targets


@pytest.mark.parametrize("text", ["%other.json", "%other.json::a", "%/etc/x.yaml#a#b", "%../x.YML::a", "%a.json.b.yml"])
def test_macros_of_files_are_refused(text):
    for config in ({"a": text}, {"_desc_": text}, {"a": [{"b": text}]}):
        (fault,) = macro_faults(config)
        assert "a macro of another file is not allowed" in fault


TARGETS = [
    "os.system", "subprocess.run", "builtins.eval", "eval", "exec", "open", "print", "posix.system", "pathlib.Path",
    "torch.load", "torch.hub.load", "torch.utils.cpp_extension.load", "torch.jit.load", "torch.compile",
    "torch.nn.modules.module.torch.load", "torch.nn.functional.torch.load", "torch.optim.optimizer.functools.partial",
    "monai.data.utils.os.system", "monai.data.utils.pickle.loads", "monai.data.utils.np.load", "monai.bundle.run",
    "monai.utils.optional_import", "monai.utils.module.instantiate", "monai.utils.set_determinism_",
    "monai.apps.download_and_extract", "monai.data", "monai", "download_url", "run", "instantiate", "load",
    "ignite.engine.Engine", "ignite.metrics.torch.load", "numpy.load", "nibabel.load", "pickle.loads", "dill.loads",
    "shared.files.os.remove", "shared.files.shutil.rmtree", "tools.push.push", "tests.commands.run", "shared",
    "shared.files.__builtins__", "shared._x", "shared.__loader__.load_module", "shared.files.Path.__class__",
    "xshared.y", "x_lib", "X_lib.y.os.system", "cxr_ldm_lib.files.os.remove", "_lib.x", "../x_lib.y", "scripts.x",
    "$eval('1')", "@name", "%name", "%x.json::y", "", " torch.nn.Identity", "torch.nn.Identity ", "torch..nn",
    "torch.nn.", ".torch.nn", "torch.nn.Identity\n", "ｏｓ.system", "torch．nn.Identity", "tоrch.nn.Identity",
    "torch.nn.Identity()", "a" * 10_000, None, 1, True, ["torch.nn.Identity"], {"_target_": "torch.nn.Identity"},
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: ascii(target)[:40])
@pytest.mark.parametrize("key", ["_target_", "+_target_", "network#_target_", "a::b::_target_"])
def test_targets_outside_of_the_packages_are_refused(target, key):
    for config in ({key: target}, {"a": [{"b": {key: target, "x": 1}}]}):
        assert len(target_faults(config)) >= 1


@pytest.mark.parametrize(
    "target",
    ["Compose", "DataLoader", "torch.nn.L1Loss", "torch.optim.lr_scheduler.LinearLR", "ignite.metrics.Accuracy",
     "monai.utils.set_determinism", "shared.files.sha256_of_file", "cxr_ldm_lib.files.sha256_of_file"],
)  # fmt: skip
def test_ordinary_targets_pass(target):
    assert target_faults({"a": {"_target_": target}}) == []


@pytest.mark.parametrize("target", ["shared.files.Path", "monai.data.dataset.Path", "shared.losses.nn.Identity"])
def test_what_a_package_borrowed_is_found_when_it_is_imported(target):
    (fault,) = signature_faults({"a": {"_target_": target}})
    assert "belongs to" in fault


# The command


def test_the_command_names_file_id_and_text(tmp_path, capsys):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    config: dict[str, Any] = {
        "a": {"b": "$eval('1')"},
        "c": {"_target_": "os.system"},
        "d": "%x.json::y",
        "e": "$1 + 1",
    }
    bad.write_text(json.dumps(config))
    good.write_text(json.dumps({"e": "$1 + 1"}))
    with pytest.raises(SystemExit) as stopped:
        check_files(str(good), str(bad))
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{bad}: a#b: $eval('1'): eval is not allowed",
        f"{bad}: d: %x.json::y: a macro of another file is not allowed",
        f"{bad}: c#_target_: os.system: expected a component of MONAI, torch.nn, torch.optim, ignite.metrics or the "
        "bundle",
    ]
    check_files(str(good))
    assert capsys.readouterr().out == "1 configurations: all expressions and targets are allowed\n"


def test_a_file_that_hides_a_key_or_is_no_json_is_named(tmp_path, capsys):
    for number, text in enumerate(('{"a": "$eval(1)", "a": 1}', "{", "\ufeff{}"), 1):
        file = tmp_path / f"{number}.json"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit):
            check_files(str(file))
        assert capsys.readouterr().out.startswith(f"{file}: ")
    with pytest.raises(ValueError, match="^files: expected at least one"):
        check_files()


def test_lint_runs_the_command_over_every_configuration(tmp_path: Path):
    lines = (ROOT / "Makefile").read_text().splitlines()
    (line,) = [line for line in lines if "tools.bundle_checks.expressions" in line]
    assert lines[: lines.index("test: lint")].index(line) > lines.index("lint: $(VENV)/installed")
    assert line.split()[-1] == "bundles/*/configs/*.json"
    assert set(ROOT.glob("bundles/*/configs/*.json")) == set(CONFIGS)
    (tmp_path / "x.json").write_text('{"a": "$eval(1)"}')
    ended = commands.run("tools.bundle_checks.expressions", *CONFIGS, tmp_path / "x.json", limit=60)
    assert (ended.code, ended.out) == (1, f"{tmp_path}/x.json: a: $eval(1): eval is not allowed\n")
