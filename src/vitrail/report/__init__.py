"""The report: one self-contained HTML page that says how good a run is, and where it fails."""

from vitrail.report.page import write_report as write_report
