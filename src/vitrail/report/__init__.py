"""The report: one self-contained HTML page that says how good a run is, and where it fails.

What draws it is imported when a report is first written: a run has trained for a while by then.
"""

from typing import TYPE_CHECKING

from vitrail.lazy import lazy

if TYPE_CHECKING:
    from vitrail.report.page import write_report as write_report

__getattr__, __dir__ = lazy(__name__, {"write_report": ("vitrail.report.page", "write_report")})
