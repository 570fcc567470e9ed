"""From the paths that people name to volumes; from many metrics pages to one."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from filer.errors import Misconfigured
from filer.settings import VolumeSettings
from filer.supervisor.exposition import merge
from filer.supervisor.routing import routes

VOLUMES = [VolumeSettings(name=name, core="file:///x", junction=junction)
           for name, junction in (("a", "/shows"), ("b", "/shows2"), ("c", "/prod/cg"))]


@pytest.mark.parametrize(("path", "found"), [
    ("/shows", [("a", "")]),
    ("/shows/", [("a", "")]),
    ("/shows/x/y.exr", [("a", "x/y.exr")]),
    ("//shows//./x/", [("a", "x")]),
    ("/shows2/x", [("b", "x")]),
    ("/prod/cg/\udcff", [("c", "\udcff")]),
    ("/", [("a", ""), ("b", ""), ("c", "")]),
])
def test_a_path_leads_to_its_volume(path, found):
    assert [(route.volume.name, route.path) for route in routes(path, VOLUMES)] == found


@pytest.mark.parametrize("path", ["", "shows/x", "/prod", "/show", "/other/x", "/shows/../x"])
def test_a_path_that_leads_nowhere_is_refused_with_the_junctions(path):
    with pytest.raises(Misconfigured) as caught:
        routes(path, VOLUMES)

    assert caught.value.hint == "exported here: /shows, /shows2, /prod/cg"


PAGE = """\
# HELP filer_upcalls_total FUSE requests
# TYPE filer_upcalls_total counter
filer_upcalls_total{operation="lookup"} 7.0
# HELP filer_latency Latency
# TYPE filer_latency histogram
filer_latency_bucket{le="1.0"} 1.0
filer_latency_bucket{le="+Inf"} 2.0
filer_latency_count 2.0
filer_latency_sum 3.0
"""


def test_pages_of_volumes_become_one_with_the_volume_as_a_label():
    families = {f.name: f for f in merge({"a": PAGE, "b": PAGE})}

    samples = families["filer_upcalls"].samples
    assert [(s.labels["volume"], s.labels["operation"], s.value) for s in samples] == [
        ("a", "lookup", 7.0), ("b", "lookup", 7.0)]
    assert len(families["filer_latency"].samples) == 8
    assert families["filer_latency"].type == "histogram"


def test_one_volumes_nonsense_does_not_hide_the_others():
    families = merge({"a": "}{ nonsense", "b": PAGE})

    assert {s.labels["volume"] for f in families for s in f.samples} == {"b"}


def test_the_real_metrics_survive_the_merge():
    from prometheus_client import generate_latest

    from filer import metrics

    text = generate_latest(metrics.REGISTRY).decode()
    merged = {f.name for f in merge({"a": text})}

    assert merged == {f.name for f in text_string_to_metric_families(text)}
