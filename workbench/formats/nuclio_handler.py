"""The program of a Nuclio function: asks the workbench what it sees in CVAT's frame. It is copied into Nuclio as
main.py and runs there, with nothing but Python: this file imports nothing of the workbench."""

import json
import os
import urllib.error
import urllib.request

TIMEOUT_S = 110


def handler(context, event):
    """CVAT's call ({"image": base64, "threshold": 0..1}) in, CVAT's list of shapes out."""
    body = event.body if isinstance(event.body, dict) else json.loads(event.body)
    asked = {"model": os.environ["WORKBENCH_MODEL"], "images": [body["image"]]}
    if body.get("threshold"):
        asked["confidence"] = body["threshold"]
    headers = {"Content-Type": "application/json"}
    if os.environ["WORKBENCH_TOKEN"]:
        headers["Authorization"] = "Bearer " + os.environ["WORKBENCH_TOKEN"]
    url = os.environ["WORKBENCH_URL"].rstrip("/") + "/v1/predict"
    try:
        request = urllib.request.Request(url, json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            seen = json.load(answer)
        code, said = 200, shapes(seen, json.loads(os.environ["WORKBENCH_RENAMES"]))
    except urllib.error.HTTPError as error:
        code, said = error.code, {"error": error.read().decode("utf-8", "replace")}
    except (OSError, ValueError) as error:
        code, said = 503, {"error": "%s does not answer (%s). Is the workbench up?" % (url, error)}
    return context.Response(body=json.dumps(said), headers={}, content_type="application/json", status_code=code)


def shapes(seen, renames):
    """The workbench's answer as CVAT takes it: inside the image, with an area, most confident first."""
    found = []
    image = seen["images"][0]
    for one in image["objects"]:
        item = {
            "label": renames.get(one["label"], one["label"]),
            "confidence": one["confidence"],
            "attributes": [
                {"name": "wb_source", "value": "model:" + seen["model"]},
                {"name": "wb_score", "value": "%g" % one["confidence"]},
            ],
        }
        if seen["task"] == "tags":
            found.append(dict(item, type="tag"))
            continue
        corners = one["polygon"] or [one["xyxy"][:2], one["xyxy"][2:]]
        inside = [(min(max(x, 0), image["width"]), min(max(y, 0), image["height"])) for x, y in corners]
        wide, high = (max(values) - min(values) for values in zip(*inside))
        if wide > 0 and high > 0:
            kind = "polygon" if one["polygon"] else "rectangle"
            found.append(dict(item, type=kind, points=[value for point in inside for value in point]))
    return found
