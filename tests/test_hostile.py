"""Files that try to run code. Each payload would create a file called MARK in the working folder."""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import importlib
import io
import json
import os
import pickle
import subprocess
import time
import zipfile
from random import Random

import pytest
import torch
from files_support import same
from torch import fx, nn

from morph.errors import ModelFileError, UnsafeFileError
from morph.files import names, open_model, read_record
from morph.files.describe import describe
from morph.files.rebuild import rebuild
from morph.files.spec import from_text

CODE = "__import__('pathlib').Path('MARK').touch()"


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def marked():
    """Whether the payload ran; forgets it."""
    found = os.path.exists("MARK")
    if found:
        os.remove("MARK")
    return found


class Counter:
    """Counts what is imported and built."""

    def __init__(self, monkeypatch):
        self.imports, self.built = [], []
        resolve, graph, module = names.resolve, fx.Graph.__init__, nn.Module.__init__
        monkeypatch.setattr(names, "resolve", lambda name: (self.imports.append(name), resolve(name))[1])
        monkeypatch.setattr(fx.Graph, "__init__", lambda *a, **k: (self.built.append("graph"), graph(*a, **k))[1])
        monkeypatch.setattr(nn.Module, "__init__", lambda *a, **k: (self.built.append("module"), module(*a, **k))[1])
        monkeypatch.setattr(fx.GraphModule, "__new__", lambda cls, *a, **k: self.built.append("graph module"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        y = torch.flatten(self.layer(x) * self.gain, start_dim=1)
        return y.view(y.shape[0], -1)


def write(text, content, **changes):
    whole = {"format": "morph", "version": 1, "description": text, "tensors": content, "meta": "{}", "record": None}
    torch.save({**whole, **changes}, "evil.morph")


def graph_file(change):
    """Write a graph network whose nodes were changed; ``change`` gets them by operation."""
    description, tensors = describe(Net())
    text = json.loads(description.to_text())
    nodes = text["modules"][-1]["graphs"]["always"]
    by_op = {}
    for node in nodes:
        by_op.setdefault("getattr" if node["target"] == "getattr" else node["op"], node)
    change(by_op, nodes)
    write(json.dumps(text), tensors)


def set_in(op, field, value):
    return lambda by_op, nodes: by_op[op].update({field: value})


def refuses(match, counter, *, imports=0):
    """Opening the file raises one line that matches, builds nothing, and runs nothing."""
    with pytest.raises(ModelFileError, match=match) as caught:
        open_model("evil.morph")
    assert "\n" not in str(caught.value)
    assert counter.built == []
    assert len(counter.imports) <= imports
    assert not marked()
    return caught.value


def test_the_unchanged_graph_opens(monkeypatch):
    graph_file(lambda by_op, nodes: None)
    x = torch.randn(2, 3)
    assert open_model("evil.morph").model(x).shape == (2, 3)
    counter = Counter(monkeypatch)
    open_model("evil.morph")
    assert counter.built.count("graph") == 1
    assert counter.built.count("module") == 2


def test_fx_itself_runs_such_a_graph():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.relu, (x,), {f"a={CODE}, out": None}))
    with pytest.raises(TypeError):
        fx.GraphModule(nn.Module(), graph)(torch.zeros(1))
    assert marked()


def partial_of(name, *args):
    return {"partial": [{"global": name}, {"tuple": [*args]}, {"dict": []}]}


def last_call(target, *args):
    """Replace the getattr node by another function call."""
    return lambda by_op, nodes: by_op["getattr"].update(target=target, args=[*args])


X = {"node": "x"}
GRAPHS = {
    "keyword argument": (set_in("call_function", "kwargs", {f"a={CODE}, start_dim": 1}), "graph argument called"),
    "keyword of the language": (set_in("call_function", "kwargs", {"lambda": 1}), "graph argument called 'lambda'"),
    "magic keyword": (set_in("call_function", "kwargs", {"__class__": 1}), "graph argument called"),
    "module path": (set_in("call_module", "target", f"layer({CODE})"), "that calls .*not a module of it"),
    "module path to a method": (set_in("call_module", "target", "layer.register_forward_hook"), "not a module of it"),
    "module path to a class": (set_in("call_module", "target", "layer.__class__"), "not a module of it"),
    "input": (set_in("placeholder", "target", f"x={CODE}"), "a graph input called"),
    "inputs": (set_in("placeholder", "target", "*x"), "a graph input called"),
    "keyword as input": (set_in("placeholder", "target", "import"), "a graph input called 'import'"),
    "node name": (set_in("call_module", "name", f"x; {CODE}"), "a graph node called"),
    "node name twice": (set_in("call_module", "name", "x"), "a graph node called 'x', which is not a new identifier"),
    "magic node name": (set_in("call_module", "name", "__builtins__"), "a graph node called"),
    "parameter path": (set_in("get_attr", "target", "layer.forward.__globals__"), "that reads .*not a parameter"),
    "parameter path of code": (set_in("get_attr", "target", CODE), "that reads .*not a parameter"),
    "attribute of a parameter": (set_in("get_attr", "target", "gain.__class__"), "that reads .*not a parameter"),
    "magic method": (set_in("call_method", "target", "__reduce_ex__"), "calls the method '__reduce_ex__'"),
    "class by method": (set_in("call_method", "target", "__class__"), "calls the method '__class__'"),
    "method of code": (set_in("call_method", "target", f"view({CODE})"), "calls the method"),
    "writing method": (set_in("call_method", "target", "tofile"), "calls the method 'tofile'"),
    "calling method": (set_in("call_method", "target", "apply_"), "calls the method 'apply_'"),
    "method without object": (set_in("call_method", "args", []), "calls the method 'view'"),
    "getattr to a class": (set_in("getattr", "args", [X, "__class__"]), "reads the attribute"),
    "getattr by a computed name": (set_in("getattr", "args", [X, X]), "reads the attribute"),
    "getattr with a default": (set_in("getattr", "args", [X, "shape", 1]), "reads the attribute"),
    "getattr to a method": (set_in("getattr", "args", [X, "register_hook"]), "reads the attribute"),
    "builtin getattr": (last_call("builtins.getattr", X, "__class__"), "calls 'builtins.getattr'"),
    "exec": (last_call("builtins.exec", CODE), "calls 'builtins.exec'"),
    "eval": (last_call("eval", CODE), "calls 'eval'"),
    "system": (last_call("os.system", "touch MARK"), "calls 'os.system'"),
    "load": (last_call("torch.load", "evil.morph"), "calls 'torch.load'"),
    "hub": (last_call("torch.hub.load", "a", "b"), "calls 'torch.hub.load'"),
    "import": (last_call("importlib.import_module", "this"), "calls 'importlib.import_module'"),
    "attrgetter": (last_call("operator.attrgetter", "__class__"), "calls 'operator.attrgetter'"),
    "methodcaller": (last_call("operator.methodcaller", "__reduce__"), "calls 'operator.methodcaller'"),
    "loader": (last_call("torch.__loader__", X), "calls 'torch.__loader__'"),
    "module class": (last_call("torch.nn.modules.linear.Linear", 2, 3), "calls 'torch.nn.modules.linear.Linear'"),
    "class as argument": (
        set_in("call_module", "args", [{"global": "torch.nn.modules.linear.Linear"}]),
        "'global' is not an argument that a graph may have",
    ),
    "partial as argument": (
        set_in("call_module", "args", [partial_of("os.system", "touch MARK")]),
        "'partial' is not an argument",
    ),
    "operation": (set_in("call_module", "op", "exec"), "'exec' is not the kind of a node"),
    "early output": (set_in("call_module", "op", "output"), "'output' is not the kind of a node"),
    "later node": (set_in("call_module", "args", [{"node": "view"}]), "there is no node 'view'"),
    "no output": (lambda by_op, nodes: nodes.pop(), "is not the kind of a node in this place"),
    "two outputs": (set_in("output", "args", [X, X]), "the output has not one argument"),
    "no nodes": (lambda by_op, nodes: nodes.clear(), "it has no nodes"),
}


@pytest.mark.parametrize("way", GRAPHS)
def test_graphs_that_reach_for_code_are_refused_before_anything_is_built(way, monkeypatch):
    change, match = GRAPHS[way]
    graph_file(change)
    refuses(match, Counter(monkeypatch))


def module_file(change, model=None):
    """Write a module tree whose parts were changed; ``change`` gets the specification of the root."""
    description, tensors = describe(model or nn.Sequential(nn.ReLU(), nn.Linear(2, 3)))
    text = json.loads(description.to_text())
    change(text["modules"][-1])
    write(json.dumps(text), tensors)


def attribute(name, value):
    return lambda root: root["attributes"].update({name: value})


VIT = {"global": "timm.models.vision_transformer.VisionTransformer"}
RELU = {"global": "torch.nn.modules.activation.ReLU"}
CLASSES = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "builtins.exec",
    "torch.fx.graph_module.GraphModule",
    "torch.jit._script.RecursiveScriptModule",
    "torch.package.package_importer.PackageImporter",
    "torchvision.models.feature_extraction.DualGraphModule",
    "timm.models._features_fx.FeatureGraphNet",
    "torch.nn.modules.lazy.LazyModuleMixin",
    "torch.nn.parallel.data_parallel.DataParallel",
    "their_code.Net",
    "torch.nn.modulesX.Net",
    "ReLU",
    f"torch.nn.modules.{CODE}",
    "torch.nn.modules.linear.__builtins__",
    "",
]
MODULES = {
    **{f"class {name}": (lambda root, name=name: root.update(cls=name), "wants ") for name in CLASSES},
    "forward": (attribute("forward", RELU), "sets the attribute 'forward'"),
    "call": (attribute("_call_impl", RELU), "sets the attribute '_call_impl'"),
    "compiled call": (attribute("_compiled_call_impl", RELU), "sets the attribute '_compiled_call_impl'"),
    "hooks": (attribute("_forward_hooks", {"dict": [[1, RELU]]}), "sets the attribute '_forward_hooks'"),
    "class": (attribute("__class__", RELU), "sets the attribute '__class__'"),
    "children": (attribute("_modules", {"dict": []}), "sets the attribute '_modules'"),
    "code": (attribute(CODE, 1), "sets the attribute"),
    "loaded function": (attribute("f", {"global": "torch.load"}), "wants torch.load, .*--trust torch.load"),
    "system": (attribute("f", {"global": "os.system"}), "wants os.system, .*use --allow-code"),
    "graph module": (attribute("f", {"global": "torch.fx.graph_module.GraphModule"}), "wants torch.fx"),
    "model class as value": (attribute("f", VIT), "wants timm"),
    "partial": (attribute("f", partial_of("os.system", "touch MARK")), "wants os.system"),
    "partial in partial": (
        attribute("f", partial_of("torch.relu", partial_of("builtins.exec", CODE))),
        "wants builtins.exec",
    ),
    "partial of a partial": (
        attribute("f", {"partial": [partial_of("torch.relu"), {"tuple": []}, {"dict": []}]}),
        "'partial' is not a value",
    ),
    "keyword of a partial": (
        attribute("f", {"partial": [RELU, {"tuple": []}, {"dict": [[CODE, 1]]}]}),
        "a keyword is not",
    ),
    "enumeration": (attribute("f", {"enum": ["subprocess.Popen", "touch MARK"]}), "wants subprocess.Popen"),
    "instance": (attribute("f", {"object": ["subprocess.Popen", {"dict": []}]}), "wants subprocess.Popen"),
    "node": (attribute("f", {"node": "x"}), "there is no node 'x'"),
    "tag": (attribute("f", {"exec": CODE}), "'exec' is not a value"),
    "two tags": (attribute("f", {"tuple": [], "exec": CODE}), "expected one tag"),
    "dtype": (attribute("f", {"dtype": "load"}), "there is no dtype 'load'"),
    "device": (attribute("f", {"device": CODE}), "is not a device"),
    "key": (attribute("f", {"dict": [[[1], 2]]}), "a key is neither plain"),
    "pair": (attribute("f", {"dict": [[1]]}), "a dictionary item is not a pair"),
    "size": (attribute("f", {"size": ["a"]}), "a size holds something else"),
    "depth": (attribute("f", functools.reduce(lambda v, _: [v], range(40), 1)), "nested too deeply"),
    "child of code": (lambda root: root["children"].update({f'a"]; {CODE}; ["': 0}), "a part called"),
    "magic child": (lambda root: root["children"].update({"__class__": 0}), "a part called '__class__'"),
    "child as method": (lambda root: root["children"].update({"forward": 0}), "a part called 'forward'"),
    "child of itself": (lambda root: root["children"].update({"a": 2}), "a child is module 2"),
    "negative child": (lambda root: root["children"].update({"a": -1}), "a child is module -1"),
    "buffer as method": (lambda root: root["buffers"].update({"state_dict": None}), "a part called 'state_dict'"),
    "two parts": (lambda root: root["buffers"].update({"0": None}), "two parts share a name"),
    "no tensor": (lambda root: root["buffers"].update({"a": "b"}), "there is no tensor 'b'"),
    "no buffer": (lambda root: root["non_persistent"].append("a"), "a non-persistent buffer is not a buffer"),
    "graph in a module": (lambda root: root["graphs"].update(always=[]), "do not belong there"),
    "mode": (lambda root: root.update(cls=names.NETWORKS[0], graphs={"never": []}), "do not belong there"),
    "number as class": (lambda root: root.update(cls=3), "cls is int, expected str"),
    "list as children": (lambda root: root.update(children=[]), "children is list, expected an object"),
    "object as list": (lambda root: root.update(non_persistent={}), "is dict, expected list"),
}


@pytest.mark.parametrize("way", MODULES)
def test_module_trees_that_reach_for_code_are_refused_before_anything_is_built(way, monkeypatch):
    change, match = MODULES[way]
    module_file(change)
    refuses(match, Counter(monkeypatch))


SEEN_ON_IMPORT = {
    "alias of a module": (lambda root: root.update(cls="torch.nn.modules.linear.Module"), "only another name of"),
    "alias of torch": (attribute("f", {"global": "torch.nn.modules.linear.torch"}), "only another name of"),
    "function as class": (lambda root: root.update(cls="torchvision.models.resnet.resnet18"), "not one of torch"),
    "function as value": (attribute("f", {"global": "timm.layers.create_act.create_act_layer"}), "not one of torch.nn"),
    "missing class": (lambda root: root.update(cls="torch.nn.modules.linear.Absent"), "needs .*Absent, which"),
    "missing module": (lambda root: root.update(cls="torch.nn.modules.absent.Absent"), "needs .*Absent, which"),
    "lazy": (lambda root: root.update(cls="torch.nn.modules.conv.LazyConv2d"), "without running its code"),
    "class as enumeration": (attribute("f", {"enum": ["torch.nn.modules.linear.Linear", 1]}), "not an enumeration"),
    "hidden method": (attribute("insert", RELU), "replaces the method 'insert' of"),
    "hidden method by a child": (lambda root: root["children"].update(append=0), "replaces the method 'append' of"),
}


@pytest.mark.parametrize("way", SEEN_ON_IMPORT)
def test_names_that_are_not_what_they_seem_are_refused_before_anything_is_built(way, monkeypatch):
    if "timm" in str(SEEN_ON_IMPORT[way][1]) or way == "function as value":
        pytest.importorskip("timm")
    change, match = SEEN_ON_IMPORT[way]
    module_file(change)
    refuses(match, Counter(monkeypatch), imports=9)


def test_a_recurrent_layer_links_only_its_own_parameters(monkeypatch):
    module_file(attribute("_flat_weights_names", ["forward"]), nn.RNN(2, 3))
    with pytest.raises(ModelFileError, match=r"the parameters of .*RNN are not those it lists"):
        open_model("evil.morph")
    module_file(attribute("_flat_weights", []), nn.RNN(2, 3))
    with pytest.raises(ModelFileError, match=r"the parameters of .*RNN are not those it lists"):
        open_model("evil.morph")


def test_an_enumeration_has_only_its_members():
    pytest.importorskip("timm")
    module_file(attribute("f", {"enum": ["timm.layers.format.Format", "NCHW"]}))
    assert open_model("evil.morph").model.f == "NCHW"
    module_file(attribute("f", {"enum": ["timm.layers.format.Format", "HELLO"]}))
    with pytest.raises(ModelFileError, match=r"wants timm.layers.format.Format\('HELLO'\), which this version"):
        open_model("evil.morph")


JUNK = [
    None,
    True,
    -1,
    10**30,
    0.5,
    "",
    "x",
    "__class__",
    "forward",
    [],
    [[]],
    {},
    {"tuple": 3},
    {"global": 3},
    {"node": "x"},
    {"global": "torch.relu"},
    {"dict": [[1, 2]]},
    {"slice": [1]},
    {"partial": [1, 2, 3]},
    {"set": [[1]]},
    {"dtype": []},
    {"enum": ["torch.nn.modules.linear.Linear", 1]},
    {"object": [1, 2]},
    {"ellipsis": []},
    {"device": "cuda:x"},
]


def places(value, found):
    """Every ``(container, key)`` in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        places(value[key], found)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_any_damage_gives_one_clear_line_or_a_model(seed):
    random = Random(seed)
    description, tensors = describe(nn.Sequential(nn.LSTM(2, 3), Net(), nn.TransformerEncoderLayer(4, 2, 3)))
    outcomes, lines = {"model": 0, "error": 0}, []
    for _ in range(150):
        text = json.loads(description.to_text())
        place, key = random.choice(places(text, []))
        if isinstance(place, dict) and random.random() < 0.2:
            place[random.choice(["a", "__dict__", "weight", "forward"])] = place.pop(key)
        else:
            place[key] = random.choice(JUNK)
        try:
            rebuild(from_text(json.dumps(text)), {name: t.clone() for name, t in tensors.items()})
            outcomes["model"] += 1
        except ModelFileError as error:
            outcomes["error"] += 1
            lines.append(str(error).count("\n"))
    assert min(outcomes.values()) > 5
    assert not any(lines)


def test_libraries_are_not_looked_for_in_the_working_folder():
    with open("torchvision.py", "w") as file:
        file.write(CODE)
    module_file(lambda root: root.update(cls="torchvision.models.absent.Net"))
    with pytest.raises(ModelFileError, match="cannot be imported"):
        open_model("evil.morph")
    assert not marked()


# ---- pickles


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def holding(value):
    model = nn.Sequential(nn.ReLU())
    model[0].extra = value
    return model


def hooked():
    model = nn.Sequential(nn.ReLU())
    model[0]._forward_hooks[0] = functools.partial(nn.functional.relu)
    return model


def hiding():
    model = nn.Sequential(nn.ReLU())
    model[0].__dict__["forward"] = nn.Linear
    return model


PICKLES = {
    "system": (lambda: Call(os.system, "touch MARK"), "wants posix.system", True),
    "exec": (lambda: Call(builtins.exec, CODE), "wants builtins.exec", True),
    "eval": (lambda: Call(builtins.eval, CODE), "wants builtins.eval", True),
    "import": (lambda: Call(importlib.import_module, "payload"), "wants importlib.import_module", True),
    "load": (lambda: Call(torch.load, "inner.pt", None, None), "wants torch.serialization.load", False),
    "popen": (lambda: Call(subprocess.Popen, ["touch", "MARK"]), "wants (subprocess|commands).Popen", True),
    "in a module": (lambda: holding(Call(builtins.exec, CODE)), "wants builtins.exec", True),
    "in a checkpoint": (lambda: {"state_dict": {}, "x": Call(builtins.exec, CODE)}, "wants builtins.exec", True),
    "partial": (lambda: holding(functools.partial(builtins.exec, CODE)), "wants builtins.exec", False),
    "graph module": (lambda: fx.symbolic_trace(nn.Sequential(nn.ReLU())), "wants torch.fx", False),
    "graph": (lambda: holding(fx.symbolic_trace(nn.ReLU()).graph), "wants (torch.fx|builtins.dict)", False),
    "constructor": (lambda: holding(Call(nn.Linear, 2, 3)), "0.extra wants to call torch.nn.*Linear", False),
    "constructor of one": (lambda: holding(Call(nn.Flatten, 2)), "wants to call .*Flatten, which is not", False),
    "hook": (hooked, "0 has hooks \\(_forward_hooks\\)", False),
    "forward": (hiding, "sets the attribute 'forward'", False),
    "module in a list": (lambda: holding([nn.ReLU()]), "0.extra holds a module that is not", False),
    "bytes": (lambda: holding(bytearray(b"a")), "0.extra is of type bytearray", False),
}


@pytest.mark.parametrize("way", PICKLES)
def test_pickles_that_reach_for_code_are_refused_and_run_nothing(way, monkeypatch):
    make, match, lively = PICKLES[way]
    with open("payload.py", "w") as file:
        file.write(CODE)
    monkeypatch.syspath_prepend(".")
    torch.save(make(), "evil.pt")
    counter = Counter(monkeypatch)
    with pytest.raises(UnsafeFileError, match=match) as caught:
        open_model("evil.pt")
    assert "\n" not in str(caught.value)
    assert counter.built == []
    assert not marked()
    if lively:  # the payload is a real one: it runs on the user's word
        with contextlib.suppress(ModelFileError):
            open_model("evil.pt", allow_code=True)
        assert _eventually_marked()


def _eventually_marked():
    for _ in range(100):
        if marked():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("trust", [["posix"], ["os.system"], ["posix.system"], ["torch.fx"], [""], ["builtins.exec"]])
def test_trust_never_reaches_a_call(trust):
    for value in (
        Call(os.system, "touch MARK"),
        Call(builtins.exec, CODE),
        holding(Call(builtins.exec, CODE)),
        holding(Call(builtins.exec, CODE, {})),
    ):
        torch.save(value, "evil.pt")
        with pytest.raises(ModelFileError):
            open_model("evil.pt", trust=trust)
        assert not marked()


def test_what_others_declared_safe_is_not_used_and_stays_declared():
    torch.save(holding(Call(builtins.exec, CODE)), "evil.pt")
    with torch.serialization.safe_globals([builtins.exec]):
        with pytest.raises(UnsafeFileError, match=r"wants builtins\.exec"):
            open_model("evil.pt")
        assert builtins.exec in torch.serialization.get_safe_globals()
    assert not marked()


def test_old_pickles_and_bare_pickles_run_nothing():
    for way in ("torch", "pickle"):
        with open("evil.pt", "wb") as file:
            if way == "torch":
                torch.save(Call(os.system, "touch MARK"), file, _use_new_zipfile_serialization=False)
            else:
                pickle.dump(Call(os.system, "touch MARK"), file, protocol=2)
        with pytest.raises(ModelFileError, match="old, non-zip format"):
            open_model("evil.pt")
        assert not marked()


def test_our_own_file_with_a_pickle_inside_runs_nothing():
    description, tensors = describe(nn.ReLU())
    for field in ("record", "tensors", "meta"):
        write(description.to_text(), tensors, **{field: Call(builtins.exec, CODE)})
        for open_it in (open_model, read_record):
            with pytest.raises(UnsafeFileError, match=r"wants builtins\.exec"):
                open_it("evil.morph")
        assert not marked()
    write(description.to_text(), {"a": nn.ReLU()})
    with pytest.raises(ModelFileError, match="1 tensors are missing or too many"):
        open_model("evil.morph")


def test_hostile_exported_programs_run_nothing_without_the_users_word():
    torch.export.save(torch.export.export(nn.ReLU(), (torch.randn(2),)), "good.pt2")
    payload = io.BytesIO()
    torch.save(Call(builtins.exec, CODE), payload)
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("evil.pt2", "w", zipfile.ZIP_STORED) as evil:
        for info in good.infolist():
            evil.writestr(info.filename, payload.getvalue() if "sample_inputs" in info.filename else good.read(info))
    with pytest.raises(UnsafeFileError, match=r"evil.pt2: is an exported program.*nothing was run.*--allow-code"):
        open_model("evil.pt2")
    assert not marked()
    os.rename("evil.pt2", "evil.pt")
    with pytest.raises(UnsafeFileError, match="is an exported program"):
        open_model("evil.pt")
    assert not marked()


def test_what_a_file_attaches_to_a_tensor_is_dropped():
    layer = nn.Linear(2, 3)
    layer.weight.extra = "text"
    torch.save(layer, "layer.pt")
    opened = open_model("layer.pt").model
    assert not hasattr(opened.weight, "extra")
    assert same(opened.weight, layer.weight)
    assert copy.deepcopy(opened.weight).requires_grad
