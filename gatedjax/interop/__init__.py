"""Other projects' checkpoints, in and out: transformers' and fla's, by tables used both ways.

safetensors.py   the files: headers, indices, tensors as views of mapped files; shards written
hf_config.py     config.json, key by key
links.py         which numbers of a tensor on disk are which numbers of a parameter here
families/        one table a family: config.json to ModelConfig and back, and the links
checkpoint.py    a folder: its family, model, links and tensors, held to each other
on_mesh.py       tensors onto a mesh and off it, slice by slice
import_hf.py, export_hf.py   the commands
"""
