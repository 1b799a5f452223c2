"""Beyond one device: what stands around a head made with ``process_group=...``."""

from .centres import export_centres, full_state_dict, import_centres
from .checkpoint import latest, load, save
from .scaler import GradScaler

__all__ = ["GradScaler", "export_centres", "full_state_dict", "import_centres", "latest", "load", "save"]
