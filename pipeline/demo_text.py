"""Sentences for the demo corpus: a small grammar over large word lists, all of it written for this project.

`sentences(seed)` gives natural, phonetically varied English without end and without repeating itself: statements,
questions, exclamations, requests, numbers, dates and names, from two words to three sentences. `{slot}` in a rule is
filled with one choice of the slot's list, which may hold slots again; `{a slot}` puts the right article before it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for word in text.split())


WORDS: dict[str, tuple[str, ...]] = {
    "name": _words(
        """Alice Oliver Martha George Sophie Henry Charlotte Victor Emma Thomas Rachel Julian Megan Patrick Laura Simon
        Natalie Edward Hannah Arthur Clara Dennis Vivian Hugo Margaret Felix Joanna Peter Isabel Walter Nora Samuel
        Judith Leonard Amy Douglas Catherine Philip Beth Gregory Olivia Nathan Ruth Jeffrey Diana Vincent Paula Howard"""
    ),
    "kin": _words(
        """my_brother my_sister our_uncle my_grandmother her_father his_cousin our_neighbor my_aunt their_daughter
        his_nephew the_twins my_mother her_husband our_youngest_son your_friend my_roommate"""
    ),
    "job": _words(
        """doctor teacher carpenter judge sailor nurse farmer engineer baker pilot painter lawyer gardener plumber
        librarian butcher chemist singer tailor captain shepherd reporter dentist mechanic fisherman waiter surgeon
        architect clerk drummer journalist coach translator guard merchant potter weaver jeweler student referee"""
    ),
    "animal": _words(
        """dog cat horse goose fox rabbit sparrow goat donkey mouse turtle squirrel pigeon hawk badger otter lamb
        parrot monkey zebra camel beaver whale dolphin spider beetle butterfly owl frog bull hedgehog swan"""
    ),
    "food": _words(
        """bread cheese soup rice fish butter honey salad ginger cake fresh_juice roasted_chicken boiled_eggs
        apple_pie green_beans onion_soup vanilla_pudding chocolate lentil_stew mushroom_sauce toast strawberry_jam
        peach_yogurt fried_potatoes smoked_salmon warm_milk oatmeal pumpkin_bread cherry_pie mint_tea"""
    ),
    "thing": _words(
        """box lamp chair key letter map basket coat hammer bottle clock violin mirror ladder umbrella wheel jacket
        blanket candle suitcase envelope camera bucket needle pillow shovel drum helmet piano rope scarf ticket wagon
        kettle knife carpet compass lantern necklace saddle telescope notebook package puzzle sweater jar bicycle
        trumpet whistle vase hat bell brush flag wallet boot glove spoon tray toy picture book bench engine"""
    ),
    "material": _words(
        "wooden copper silver leather woolen glass plastic silk brass iron paper golden stone cotton rubber marble"
    ),
    "quality": _words(
        """small large old new heavy light narrow broken empty smooth rough clean dirty round square bright dark cheap
        strange simple lovely yellow purple green orange blue gray pink thick thin sharp beautiful ugly ancient modern
        useless valuable familiar peculiar huge tiny damp dusty expensive"""
    ),
    "mood": _words(
        """happy angry tired cheerful nervous curious jealous proud anxious calm grateful lonely hungry thirsty patient
        stubborn worried confused delighted bored shy brave furious hopeful embarrassed thoughtful"""
    ),
    "adverb": _words(
        """quietly slowly quickly gently carefully suddenly eagerly politely loudly happily nervously patiently bravely
        calmly proudly usually rarely gladly kindly secretly silently briefly casually firmly"""
    ),
    "place": _words(
        """kitchen garden station library harbor market village church school museum hospital bakery office theater
        valley forest river bridge castle airport factory hotel cellar attic stable farm island beach meadow orchard
        courtyard university lighthouse workshop gallery canyon desert marsh park square cottage tunnel prison shop"""
    ),
    "town": _words(
        """Boston Chicago London Paris Denver Dublin Madrid Vienna Oxford Sydney Toronto Houston Berlin Chester Seattle
        Glasgow Portland Memphis Lisbon Dallas Brighton Montreal Geneva Cairo"""
    ),
    "weather": _words("rain snow wind fog thunder frost sunshine heat storm mist drizzle hail"),
    "month": _words("January February March April May June July August September October November December"),
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "time": _words(
        """yesterday last_night this_morning on_{day}_afternoon after_lunch before_sunrise at_noon an_hour_ago
        in_{month} last_winter two_weeks_ago during_the_{weather} at_midnight every_evening once_a_week since_{month}
        before_the_meeting for_the_first_time on_the_{ordinal}_of_{month} just_after_dinner early_on_{day}"""
    ),
    "future": _words(
        """tomorrow next_week tonight in_an_hour on_{day} before_{month} as_soon_as_possible by_{day}_morning
        at_the_end_of_{month} this_summer in_a_few_minutes after_the_holidays"""
    ),
    "ordinal": _words(
        "first second third fourth fifth seventh ninth tenth twelfth fifteenth eighteenth twentieth thirtieth"
    ),
    "number": _words(
        """two three four five six seven eight nine ten eleven twelve thirteen fifteen sixteen eighteen twenty
        twenty-four thirty thirty-seven forty fifty sixty-two seventy eighty-five ninety a_hundred"""
    ),
    "digits": tuple(str(n) for n in (7, 12, 15, 19, 23, 28, 31, 40, 46, 54, 67, 72, 80, 93, 110, 250, 300, 475, 1200)),
    "year": tuple(str(n) for n in range(1805, 2020, 3)),
    "unit": _words("miles dollars pounds minutes days pages meters gallons years seconds steps inches"),
    "many": _words(
        "apples soldiers children letters chairs windows horses oranges bottles visitors stamps coins trees"
    ),
    "person": ("{name}", "{name}", "{kin}", "the {job}", "the {quality2} {job}", "{name} and {name}", "{a job}"),
    "single": ("{name}", "he", "she", "the {job}", "my brother", "our neighbor", "her father", "the young {job}"),
    "quality2": _words("young old clever famous friendly retired tall quiet new local careless generous honest"),
    "object": (
        "the {thing}",
        "the {quality} {thing}",
        "{a quality thing}",
        "{a material thing}",
        "the {material} {thing}",
        "{name}'s {thing}",
        "the {quality} {material} {thing}",
        "their {thing}",
        "another {thing}",
        "{number} {many}",
    ),
    "quality thing": ("{quality} {thing}",),
    "material thing": ("{material} {thing}",),
    "where": (
        "in the {place}",
        "near the {place}",
        "behind the {place}",
        "at the {quality} {place}",
        "beside the {thing}",
        "under the {quality} {thing}",
        "across the {place}",
        "in {town}",
        "on the way to {town}",
        "outside the {place}",
        "between the {place} and the {place}",
        "next to {a thing}",
        "on the road to the {place}",
    ),
    "handled": _words(
        """carried dropped painted repaired borrowed sold found measured polished opened noticed bought returned stole
        wrapped described moved cleaned hid lifted broke examined forgot brought chose kept needed admired pushed
        touched photographed weighed lost ordered fixed"""
    ),
    "handle": _words(
        """carry paint repair borrow sell find measure polish open bring clean move wrap describe fix lift return hide
        choose keep push watch draw"""
    ),
    "went": _words(
        """walked traveled drove ran hurried wandered rode sailed moved climbed rushed returned jumped crawled marched
        swam stepped headed"""
    ),
    "toward": (
        "to the {place}",
        "through the {place}",
        "toward the {quality} {place}",
        "across the {place}",
        "past the {place}",
        "from {town} to {town}",
        "around the {place}",
        "back to {town}",
        "into the {place}",
        "along the {place}",
    ),
    "said": _words("said thought believed explained whispered heard claimed knew hoped shouted admitted argued"),
    "fact": (
        "the {thing} was {quality}",
        "the {place} would close {future}",
        "it was too {quality}",
        "nobody liked the {food}",
        "the {animal} had escaped",
        "the {weather} would stop soon",
        "there was enough {food}",
        "the {job} was {mood}",
        "the {thing} belonged to {name}",
        "the price was only {number} dollars",
    ),
    "sound": _words("humming ringing laughing shouting singing knocking breathing whistling sneezing crying playing"),
    "because": (
        "because the {weather} was getting worse",
        "because {fact}",
        "since there was no {food} left",
        "although {single} seemed {mood}",
        "while {person} waited {where}",
        "until the {animal} came back",
        "before the {thing} fell off the {thing}",
        "so {single} {went} {toward}",
        "but {single} was too {mood} to answer",
        "when the {job} opened the {thing}",
        "if the {weather} does not stop",
        "and then {went} {toward}",
    ),
    "polite": _words("please thank_you of_course I_think for_example after_all in_fact as_usual at_least by_the_way"),
}

STATEMENTS = _lines(
    """
    {person} {handled} {object} {where}.
    {person} {adverb} {handled} {object}.
    {person} {handled} {object} {time}.
    {person} {went} {toward} {time}.
    {person} {went} {adverb} {toward}.
    {time}, {person} {handled} {object} {where}.
    {time}, {person} {went} {toward} with {a quality thing}.
    The {thing} {where} is {quality} and {quality}.
    The {animal} {went} {toward} {because}.
    The {quality} {animal} slept {where} {time}.
    {a quality thing} was left {where}.
    There were {number} {many} {where}.
    {person} {said} that {fact}.
    {person} ate the {food} {where} {time}.
    The {job} gave {name} some {food} and {a thing}.
    We heard somebody {sound} {where}.
    The {weather} lasted for {number} days and the {place} was {quality}.
    It takes {number} minutes to walk {toward}.
    The {place} in {town} was built in {year}.
    On the {ordinal} of {month}, {number} {many} were sold {where}.
    The {food} costs {digits} dollars {where}.
    {name} will {handle} the {thing} {future}.
    I would like to {handle} {object} {future}.
    They never {handle} the {material} {thing} without asking.
    You should {handle} the {quality} {thing} before you leave.
    Most of the {many} were {quality}, but the {thing} was {quality}.
    The {job}, who was very {mood}, {handled} {object}.
    {person} {handled} {object} {because}.
    {person} {went} {toward} {because}.
    Neither {name} nor {name} could {handle} the {thing}.
    The more {food} we ate, the more {mood} we felt.
    {name} gets {mood} whenever the {animal} comes {toward}.
    "{fact}," {said2} the {job}.
    The train from {town} leaves at {hour} and arrives {where}.
    Page {digits} shows {a quality thing} and {number} {many}.
    {polite}, {person} {handled} the {thing} {time}.
    Half of the {food} was eaten by {a quality animal}.
    {name}, {name} and {name} {went} {toward}.
    A {thing}, a {thing2} and {number} {many} lay {where}.
    """
)
QUESTIONS = _lines(
    """
    Did {person} {handle} the {thing} {where}?
    Where is the {quality} {thing} that {name} {handled}?
    Why was the {job} so {mood} {time}?
    Could you {handle} the {thing} {future}, please?
    How many {many} did you see {where}?
    Have you ever been to the {place} in {town}?
    Who {handled} the {material} {thing}?
    What would you do with {a quality thing}?
    Is it true that {fact}?
    Would you rather eat {food} or {food}?
    When will {name} return {toward}?
    Which {thing} is yours, the {quality} one or the {quality} one?
    Does the {animal} always sleep {where}?
    Shall we go {toward} {future}?
    Isn't the {weather} {where} unusual for {month}?
    """
)
OTHERS = _lines(
    """
    Please {handle} the {thing} {future}.
    Don't touch the {quality} {thing}!
    What {a quality animal}!
    Be careful with the {material} {thing}, it is {quality}.
    Put the {thing} {where}, and wash your hands.
    Let's go {toward} {future}.
    How {mood} you look {time2}!
    Take {number} {many}, a little {food}, and mix them {adverb}.
    Turn left at the {place}, then walk {number} {unit}.
    """
)
SHORT = _lines(
    """
    Good morning, {name}.
    Thank you, {name}.
    The {quality} {thing}.
    {number} {unit}.
    I am {mood}.
    Nobody was {mood}.
    Come {where}.
    {town}, not {town}.
    Where is {name}?
    More {food}, please.
    Yes, {polite}.
    What {weather}!
    See you on {day}.
    {name} is {mood}.
    Chapter {number}.
    """
)
WORDS |= {
    "said2": _words("said asked whispered shouted explained repeated"),
    "hour": _words(
        """nine_o'clock half_past_ten quarter_to_seven noon ten_fifteen six_thirty eight_forty-five two_o'clock
        twenty_past_four"""
    ),
    "thing2": _words("shirt stick key ring plate cup chain leaf pen shell cap belt"),
    "time2": _words("today this_morning tonight in_that_coat"),
    "quality animal": ("{quality2} {animal}", "{mood} {animal}", "little {animal}"),
}
_SLOT = re.compile(r"\{(a )?([a-z0-9 ]+)\}")
_KINDS = ((STATEMENTS, 58), (QUESTIONS, 14), (OTHERS, 8), (SHORT, 8), (None, 12))
"""How often each kind of text is drawn; None is two or three sentences in a row."""


def sentences(seed: int) -> Iterator[str]:
    """Endless different texts of 1 to about 30 words, the same ones for the same seed."""
    random_ = random.Random(f"demo text {seed}")
    seen: set[str] = set()
    while True:
        text = _text(random_)
        if text not in seen:
            seen.add(text)
            yield text


def _text(random_: random.Random) -> str:
    (rules,) = random_.choices([rules for rules, _ in _KINDS], [weight for _, weight in _KINDS])
    if rules is not None:
        return _sentence(rules, random_)
    parts = random_.choice(((STATEMENTS, SHORT), (STATEMENTS, QUESTIONS), (SHORT, STATEMENTS), (OTHERS, STATEMENTS)))
    return " ".join(_sentence(part, random_) for part in parts)


def _sentence(rules: tuple[str, ...], random_: random.Random) -> str:
    text = _filled(random_.choice(rules), random_)
    first = text.find(next(character for character in text if character.isalnum()))
    return text[:first] + text[first].upper() + text[first + 1 :]


def _filled(rule: str, random_: random.Random) -> str:
    def fill(slot: re.Match[str]) -> str:
        words = _filled(random_.choice(WORDS[slot[2]]), random_)
        return f"{_article(words)} {words}" if slot[1] else words

    return _SLOT.sub(fill, rule)


def _article(words: str) -> str:
    silent = words.startswith(("hour", "honest"))
    voiced_as_consonant = words.startswith(("uni", "use", "one"))
    return "an" if (words[0].lower() in "aeiou" and not voiced_as_consonant) or silent else "a"
