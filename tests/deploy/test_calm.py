import re
from pathlib import Path

import vitrail

IMPORTED = re.compile(r"^\s*(import|from)\s+(openvino|nncf)\b", re.MULTILINE)


def test_nothing_imports_openvino_but_where_it_is_kept_from_reporting() -> None:
    assert IMPORTED.search("    import openvino as ov") and IMPORTED.search("from nncf import x")
    files = list(Path(vitrail.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    assert [file for file in files if IMPORTED.search(file.read_text(encoding="utf-8"))] == []
