"""Tables and figures, and the report of the run that made a model."""

from hdrq.calibrate.report import BlockReport, RunReport, report_of

__all__ = ["BlockReport", "RunReport", "report_of"]
