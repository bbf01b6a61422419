"""The words that terms of contracts are drawn from."""

from __future__ import annotations

__all__ = [
    "BENEFITS",
    "COLOURS",
    "GOODS",
    "JOBS",
    "LANGUAGES",
    "MATERIALS",
    "MONTHS",
    "PACKAGES",
    "RANKS",
    "STREETS",
    "TEAMS",
    "TOOLS",
    "TRANSPORT",
]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MATERIALS = _words("""
    amber brass canvas cedar ceramic copper cork crystal glass granite iron ivory jade leather
    linen marble nickel oak paper pewter rubber satin silver slate steel velvet walnut wicker
    wool zinc
""")
GOODS = _words("""
    anchors baskets bells benches bowls buckets buttons candles carpets clocks combs doors drums
    flutes gloves hinges kettles ladders lamps mirrors needles pipes plates ropes saddles
    shelves spoons tables trays wheels
""")
COLOURS = _words("""
    amber azure beige black blue bronze coral cream crimson cyan gold green grey indigo khaki
    lilac magenta maroon mauve navy ochre olive orange peach pink purple red scarlet teal
    turquoise violet white yellow
""")
PACKAGES = _words("""
    bags bales barrels bins bottles boxes bundles cans cartons cases casks chests containers
    crates cylinders drums envelopes folders hampers jars kegs packets pallets parcels pouches
    racks reels sacks sleeves tins tubes tubs vats
""")
TRANSPORT = _words("""
    airship barge bicycle bus camel canoe caravan cart coach donkey drone ferry freighter glider
    helicopter lorry minivan motorbike plane raft railway rickshaw schooner ship sledge steamer
    submarine tanker tractor train tram trolley truck wagon yacht
""")
JOBS = _words("""
    accountant archivist architect baker botanist bookbinder carpenter cartographer chemist cook
    courier dentist designer diver editor electrician engineer gardener geologist glazier
    interpreter jeweller lawyer librarian locksmith mason mechanic nurse optician pharmacist
    photographer pilot plumber potter printer tailor translator typist welder
""")
RANKS = _words("""
    assistant chief deputy head junior lead night principal senior trainee
""")
TEAMS = _words("""
    acoustics archives auditing bookkeeping catering cleaning compliance customs dispatch
    drafting estates exports facilities forecasting forestry fundraising imports inspection
    invoicing laboratory licensing logistics maintenance marketing nutrition payroll planning
    procurement publishing quality recruitment repairs research safety security shipping
    statistics storage surveying tooling training transport treasury warehousing
""")
BENEFITS = _words("""
    bicycle breakfast broadband cinema creche dental eyecare firewood fishing gym haircut
    heating holiday housing language laundry library lunch massage museum music opera parking
    pension physiotherapy relocation sailing skiing stock swimming telephone tennis theatre
    train yoga zoo
""")
LANGUAGES = _words("""
    Arabic Basque Bengali Breton Catalan Czech Danish Dutch Estonian Finnish French Georgian
    German Greek Hausa Hebrew Hindi Icelandic Igbo Irish Italian Japanese Korean Latvian Malay
    Maltese Mongolian Nepali Norwegian Persian Polish Portuguese Romanian Russian Spanish
    Swahili Swedish Tamil Thai Turkish Ukrainian Urdu Vietnamese Welsh Yoruba Zulu
""")
MONTHS = _words("""
    January February March April May June July August September October November December
""")
TOOLS = _words("""
    abacus anvil balance barometer camera chainsaw chisel compass crowbar drill forklift hammer
    headset kayak lantern laptop lathe loom microscope notebook oven piano printer projector
    radio ruler scanner sextant shovel stethoscope stopwatch tablet telescope toolbox torch
    tripod typewriter umbrella whistle wrench
""")
STREETS = _words(
    """Alley Avenue Close Drive Gardens Hill Lane Mews Parade Quay Row Square Street"""
)
