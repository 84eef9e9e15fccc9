"""The atomic files of `contracts.files`, by the name under which what stands above the trainer knows them."""

from potstill.contracts.files import (
    disk_errors,
    load_tensors,
    read_json,
    save_tensors,
    whole_folder,
    write_json,
    write_text,
)

__all__ = ["disk_errors", "load_tensors", "read_json", "save_tensors", "whole_folder", "write_json", "write_text"]
