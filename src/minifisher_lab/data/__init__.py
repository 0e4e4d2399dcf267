"""The datasets: `get` fetches one to this machine, `load` reads it."""

from minifisher_lab.data.fetch import by_hand as by_hand
from minifisher_lab.data.fetch import get as get
from minifisher_lab.data.load import Row as Row
from minifisher_lab.data.load import catalogue as catalogue
from minifisher_lab.data.load import kind_of as kind_of
from minifisher_lab.data.load import load as load
from minifisher_lab.data.load import load_graph as load_graph
from minifisher_lab.data.load import load_table as load_table
from minifisher_lab.data.load import load_text as load_text
from minifisher_lab.data.records import DataMissing as DataMissing
from minifisher_lab.data.records import Dataset as Dataset
from minifisher_lab.data.records import DataUnavailable as DataUnavailable
from minifisher_lab.data.records import Graph as Graph
from minifisher_lab.data.records import Table as Table
from minifisher_lab.data.records import Text as Text
from minifisher_lab.data.table import NAMES as NAMES
