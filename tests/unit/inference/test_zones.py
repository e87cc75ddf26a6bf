import numpy as np
import pytest

from workbench.errors import Invalid, NotFound
from workbench.inference.cameras import Camera, check_cameras, read_cameras
from workbench.inference.zones import Zone, depth

SQUARE = ((0.2, 0.2), (0.6, 0.2), (0.6, 0.8), (0.2, 0.8))


def test_depth_is_the_distance_to_the_border_and_negative_outside() -> None:
    found = depth(Zone("z", SQUARE), np.array([[0.4, 0.5], [0.25, 0.5], [0.1, 0.5], [0.7, 0.9], [0.4, 0.2]]))
    # Middle: 0.2 from left and right; outside corner: sqrt(0.1^2 + 0.1^2); the last lies on the border.
    assert found == pytest.approx([0.2, 0.05, -0.1, -np.sqrt(0.02), 0.0], abs=1e-9)


def test_a_point_in_the_notch_of_a_concave_zone_is_outside() -> None:
    notched = Zone("z", ((0, 0), (1, 0), (1, 1), (0.5, 0.5), (0, 1)))
    assert (depth(notched, np.array([[0.5, 0.9], [0.2, 0.5], [0.5, 0.4]])) > 0).tolist() == [False, True, True]


@pytest.mark.parametrize(("polygon", "says"), [
    (((0, 0), (1, 1)), "3..100 points"),
    (((0, 0), (1.2, 0), (1, 1)), "shares of the frame"),
    (((0, 0), (float("nan"), 0), (1, 1)), "shares of the frame"),
    (((0, 0), (1, 1), (1, 0), (0, 1)), "cross"),
    (((0, 0), (0.5, 0.5), (1, 1)), "no area"),
    ((("a", 0), (1, 1), (1, 0)), "3..100 points"),
    (((0, 0, 0), (1, 1, 1), (1, 0, 1)), "3..100 points"),
])
def test_a_zone_that_is_no_polygon_of_the_frame_is_refused(polygon: tuple, says: str) -> None:
    with pytest.raises(Invalid, match=says):
        Zone("yard", polygon)


@pytest.mark.parametrize("more", [{"kind": "fence"}, {"dwell_s": -1}, {"dwell_s": float("nan")}, {"margin": 0.5}, {"name": ""}])
def test_a_zone_s_other_settings_are_checked(more: dict) -> None:
    with pytest.raises(Invalid):
        Zone(**{"name": "z", "polygon": SQUARE, **more})


def test_a_file_of_cameras_is_read_with_zones_and_paths_beside_it(tmp_path) -> None:
    file = tmp_path / "cameras.toml"
    file.write_text('''
[[camera]]
name = "gate"
url = "rtsp://user:secret@10.0.0.5:554/live"
rate = 2
labels = ["person"]
size = [0.001, 0.5]
rows = [[1.0, 0.2, 0.9], [0.3, 0.05, 0.3]]
[[camera.zone]]
name = "yard"
polygon = [[0, 0.5], [1, 0.5], [1, 1]]
dwell_s = 2
[[camera]]
name = "tape"
url = "clips/tape.mp4"
full_speed = true
''')
    gate, tape = read_cameras(file)
    assert (gate.rate, gate.labels, gate.size, gate.rows[0]) == (2, ("person",), (0.001, 0.5), (0.3, 0.05, 0.3))
    assert gate.zones[0].polygon == ((0, 0.5), (1, 0.5), (1, 1)) and gate.zones[0].dwell_s == 2
    assert tape.url == str(tmp_path / "clips" / "tape.mp4") and tape.is_file and tape.full_speed
    assert gate.shown == "rtsp://10.0.0.5:554"
    assert "secret" not in repr(gate)


@pytest.mark.parametrize(("text", "says"), [
    ("", "no \\[\\[camera\\]\\]"),
    ("camera = []", "no \\[\\[camera\\]\\]"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\n[[camera]]\nname='A'\nurl='y.mp4'", "more than one camera named a"),
    ("[[camera]]\nname='a'\nurl='ftp://u:secret@h/x'", "'ftp' addresses are not read"),
    ("[[camera]]\nname='a'\nurl='rtsp://u:secret@'", "names no host"),
    ("[[camera]]\nname='a'\nurl='http://u:secret@h:99999999/'", "not read"),
    ("[[camera]]\nname='a'\nurl='http:/h'", "not read"),
    ("[[camera]]\nname='a b'\nurl='x.mp4'", "Camera name"),
    ("[[camera]]\nname='../x'\nurl='x.mp4'", "Camera name"),
    ("[[camera]]\nname='a'", "needs a url"),
    ("[[camera]]\nurl='x.mp4'", "Camera name"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\nrate=0", "rate 0"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\nrate=nan", "rate nan"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\nfps=5", "sets fps"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\nsize=[0.5, 0.1]", "size"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\nsize='big'", "must be a list"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\nrows=[[0.5, 0.9, 0.1]]", "rows"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\nkeep_still='yes'", "true or false"),
    ("[[camera]]\nname='a'\nurl='rtsp://u:secret@h/x'\nfull_speed=true", "only a file"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\n[[camera.zone]]\nname='z'\npolygon=[[0,0],[1,1]]", "camera a: Zone 'z'"),
    ("[[camera]]\nname='a'\nurl='x.mp4'\n[[camera.zone]]\nname='z'", "name and a polygon"),
    ("[[camera]]\nname='a'\nurl='rtsp://u:secret@h'\n[[camera.zone]]\nname='z'\npolygon=[[0,0],[1,0],[1,1]]\nlabels=3",
     "wrong type"),
    ("[[camera", "not TOML"),
    ("cameras = 3", "sets cameras"),
])
def test_a_wrong_file_of_cameras_says_what_and_where_and_no_secret(tmp_path, text: str, says: str) -> None:
    file = tmp_path / "cameras.toml"
    file.write_text(text)
    with pytest.raises(Invalid, match=says) as told:
        read_cameras(file)
    assert "secret" not in str(told.value)


def test_a_missing_or_binary_file_of_cameras_is_told(tmp_path) -> None:
    with pytest.raises(NotFound):
        read_cameras(tmp_path / "none.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Invalid, match="UTF-8"):
        read_cameras(tmp_path / "b.toml")


def test_no_camera_is_no_list() -> None:
    with pytest.raises(Invalid, match="no camera"):
        check_cameras([])


def test_what_is_shown_of_an_address_has_no_user_path_or_query() -> None:
    for url in ("http://u:p@[::1]:80/live?token=t", "https://cam.lan/abc/key", "rtsps://u@h/p"):
        shown = Camera("a", url).shown
        assert shown in ("http://[::1]:80", "https://cam.lan", "rtsps://h")
