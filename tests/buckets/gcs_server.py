"""gcp-storage-emulator with generations: Cloud Storage's conditions, which it leaves out.

Lock and array store rest on `ifGenerationMatch`, and on the generation that comes with what is
read. The emulator counts generations; here it also acts on them. Started as a script:

    python gcs_server.py PORT BUCKET
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_insert = objects.insert
_download = objects.download
_delete = objects.delete


def generation(storage, bucket: str, name: str) -> str:
    """The generation of an object, "0" if there is none."""
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"


def holds(request, response, current: str) -> bool:
    """Whether a request's conditions hold; else the response says that they do not."""
    wanted = request.query.get("ifGenerationMatch")
    unwanted = request.query.get("ifGenerationNotMatch")
    if wanted and wanted[0] != current:
        response.status = HTTPStatus.PRECONDITION_FAILED
        response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        return False
    if unwanted and unwanted[0] == current:
        response.status = HTTPStatus.NOT_MODIFIED
        return False
    return True


def insert(request, response, storage, *args, **kwargs):
    name = (request.query.get("name") or [""])[0]
    if request.query.get("uploadType") == ["multipart"]:
        name = request.data["meta"]["name"]
    if holds(request, response, generation(storage, request.params["bucket_name"], name)):
        _insert(request, response, storage, *args, **kwargs)


def download(request, response, storage, *args, **kwargs):
    current = generation(storage, request.params["bucket_name"], request.params["object_id"])
    if holds(request, response, current):
        _download(request, response, storage, *args, **kwargs)
        response["x-goog-generation"] = current


def delete(request, response, storage, *args, **kwargs):
    current = generation(storage, request.params["bucket_name"], request.params["object_id"])
    if holds(request, response, current):
        _delete(request, response, storage, *args, **kwargs)


objects.insert = insert
objects.download = download
objects.delete = delete

if __name__ == "__main__":
    # After the replacements: the server looks its handlers up when it is imported.
    from gcp_storage_emulator.server import create_server

    create_server(
        "127.0.0.1",
        int(sys.argv[1]),
        in_memory=True,
        default_bucket=sys.argv[2],
    ).run()
