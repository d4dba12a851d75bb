"""Sentences for the demo corpus: a small grammar over large word lists, all of it written for this project.

`sentences(seed)` gives natural, phonetically varied English without end and without repeating itself: statements,
questions, exclamations, requests, numbers, dates and names, from two words to three sentences. `{slot}` in a rule is
filled with one choice of that slot's list, which may hold slots again; `{a slot}` puts the right article before it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

# `slot: choice choice …`, over several lines if need be; `_` stands for a space within a choice.
_WORDS = """
name: Alice Oliver Martha George Sophie Henry Charlotte Victor Emma Thomas Rachel Julian Megan Patrick Laura Simon
    Natalie Edward Hannah Arthur Clara Dennis Vivian Hugo Margaret Felix Joanna Peter Isabel Walter Nora Samuel Judith
    Leonard Amy Douglas Catherine Philip Beth Gregory Olivia Nathan Ruth Jeffrey Diana Vincent Paula Howard Ingrid
    Keith
    Yvonne Zachary Gwen Theodore Joyce Hugh Sylvia Roy Eleanor Curtis Agnes Troy Veronica Ralph Heather Chuck Audrey
kin: my_brother my_sister our_uncle my_grandmother her_father his_cousin our_neighbor my_aunt their_daughter
    his_nephew
    the_twins my_mother her_husband our_youngest_son your_friend my_roommate an_old_friend somebody nobody everyone
    the_whole_family both_of_us the_other_boys one_of_the_girls
job: doctor teacher carpenter judge sailor nurse farmer engineer baker pilot painter lawyer gardener plumber librarian
    butcher chemist singer tailor captain shepherd reporter dentist mechanic fisherman waiter surgeon architect clerk
    drummer journalist coach translator guard merchant potter weaver jeweler student referee soldier priest duke mayor
    queen king detective author poet editor thief hunter driver cashier chef barber astronaut geologist zoologist
animal: dog cat horse goose fox rabbit sparrow goat donkey mouse turtle squirrel pigeon hawk badger otter lamb parrot
    monkey zebra camel beaver whale dolphin spider beetle butterfly owl frog bull hedgehog swan wolf bear cow pig hen
    duck eagle snake lizard shark crab worm moth giraffe leopard kangaroo ostrich penguin mule vulture weasel
food: bread cheese soup rice fish butter honey salad ginger cake fresh_juice roasted_chicken boiled_eggs apple_pie
    green_beans onion_soup vanilla_pudding chocolate lentil_stew mushroom_sauce toast strawberry_jam peach_yogurt
    fried_potatoes smoked_salmon warm_milk oatmeal pumpkin_bread cherry_pie mint_tea black_coffee cold_water pork beef
    cabbage broth spaghetti garlic_bread pickles celery raisins walnuts olives pears grapes melon sugar cinnamon_rolls
thing: box lamp chair key letter map basket coat hammer bottle clock violin mirror ladder umbrella wheel jacket
    blanket
    candle suitcase envelope camera bucket needle pillow shovel drum helmet piano rope scarf ticket wagon kettle knife
    carpet compass lantern necklace saddle telescope notebook package puzzle sweater jar bicycle trumpet whistle vase
    hat bell brush flag wallet boot glove spoon tray toy picture book bench engine anchor arrow axe badge balloon
    barrel
    bowl bracelet broom cabinet calendar cannon canoe chalk chest cloth coin crown cushion desk dictionary door drawer
    faucet feather fence fork frame guitar hinge jewel journal lid magnet mattress medal microphone mug nail newspaper
    oar oven paddle pipe plow pocket poster radio razor ribbon ring robe ruler sail saw shelf shield shoe sled sofa
    statue stove string sword table thermometer thread towel trophy truck tube uniform vehicle vest watch window
    zipper
material: wooden copper silver leather woolen glass plastic silk brass iron paper golden stone cotton rubber
    marble clay
    velvet steel bamboo ivory granite
quality: small large old new heavy light narrow broken empty smooth rough clean dirty round square bright dark cheap
    strange simple lovely yellow purple green orange blue gray pink thick thin sharp beautiful ugly ancient modern
    white
    useless valuable familiar peculiar huge tiny damp dusty expensive red brown black fragile foreign hollow loose
    rusty
    shallow slippery soft stiff tight transparent unusual usual vague warm wide worn favorite ordinary special
    precious
mood: happy angry tired cheerful nervous curious jealous proud anxious calm grateful lonely hungry thirsty patient sad
    stubborn worried confused delighted bored shy brave furious hopeful embarrassed thoughtful afraid amused ashamed
    eager gloomy guilty miserable pleased puzzled relieved sleepy surprised suspicious thrilled upset
adverb: quietly slowly quickly gently carefully suddenly eagerly politely loudly happily nervously patiently bravely
    calmly proudly usually rarely gladly kindly secretly silently briefly casually firmly almost_never at_last
    awkwardly
    cautiously cleverly deliberately finally foolishly honestly immediately obviously often roughly seriously sharply
place: kitchen garden station library harbor market village church school museum hospital bakery office theater valley
    forest river bridge castle airport factory hotel cellar attic stable farm island beach meadow orchard courtyard
    university lighthouse workshop gallery canyon desert marsh park square cottage tunnel prison shop barn bay cabin
    campus cave cemetery chapel cliff coast college corner dock dungeon field fountain garage gate gym hall
    highway hill
    jungle laboratory lake laundry mansion mill monastery mountain palace pasture pier pond porch pub ranch reef shore
    stadium stream studio swamp temple terrace tower trail volcano warehouse waterfall yard zoo
town: Boston Chicago London Paris Denver Dublin Madrid Vienna Oxford Sydney Toronto Houston Berlin Chester Seattle
    Glasgow Portland Memphis Lisbon Dallas Brighton Montreal Geneva Cairo Athens Tokyo Moscow Prague Warsaw Naples
    Venice Florence Hamburg Zurich Orlando Phoenix Atlanta Detroit Baltimore Cleveland Bristol Leeds York
weather: rain snow wind fog thunder frost sunshine heat storm mist drizzle hail cold darkness humidity
month: January February March April May June July August September October November December
day: Monday Tuesday Wednesday Thursday Friday Saturday Sunday
time: yesterday last_night this_morning on_{day}_afternoon after_lunch before_sunrise at_noon an_hour_ago in_{month}
    last_winter two_weeks_ago during_the_{weather} at_midnight every_evening once_a_week since_{month}
    before_the_meeting for_the_first_time on_the_{ordinal}_of_{month} just_after_dinner early_on_{day} all_day_long
    again_and_again at_the_end_of_the_day in_the_middle_of_the_night a_few_years_ago without_a_word as_usual
future: tomorrow next_week tonight in_an_hour on_{day} before_{month} as_soon_as_possible by_{day}_morning
    at_the_end_of_{month} this_summer in_a_few_minutes after_the_holidays sooner_or_later one_of_these_days
ordinal: first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth fifteenth eighteenth
    twentieth
    thirtieth
number: two three four five six seven eight nine ten eleven twelve thirteen fifteen sixteen eighteen twenty
    twenty-four
    thirty thirty-seven forty fifty sixty-two seventy eighty-five ninety a_hundred several a_dozen
unit: miles dollars pounds minutes days pages meters gallons years seconds steps inches weeks hours degrees yards
many: apples soldiers children letters chairs windows horses oranges bottles visitors stamps coins trees peaches
    pebbles
    sandwiches rubies ships clouds flowers roses mistakes questions languages pictures rivers stories voices wheels
    branches bridges judges churches foxes leaves knives shadows rules measures cages beaches treasures
person: {name} {name} {kin} the_{job} the_{quick}_{job} {name}_and_{name} {a_job} {a_quick_job}
single: {name} he she the_{job} my_brother our_neighbor her_father the_{quick}_{job}
quick: young old clever famous friendly retired tall quiet new local careless generous honest strict wise poor rich
    charming cruel funny handsome lazy noble polite rude selfish slim strong
quick_animal: {quick}_{animal} {mood}_{animal} little_{animal} {quality}_{animal}
quick_job: {quick}_{job} {mood}_{job}
quality_thing: {quality}_{thing} {quality}_{thing} {quality},_{quality}_{thing}
material_thing: {material}_{thing}
object: the_{thing} the_{quality}_{thing} {a_quality_thing} {a_material_thing} the_{material}_{thing} {name}'s_{thing}
    the_{quality}_{material}_{thing} their_{thing} another_{thing} {number}_{many} every_{thing} both_{many}
    no_{thing}
where: in_the_{place} near_the_{place} behind_the_{place} at_the_{quality}_{place} beside_the_{thing}
    under_the_{thing}
    across_the_{place} in_{town} on_the_way_to_{town} outside_the_{place} between_the_{place}_and_the_{place}
    beyond_the_{place}
    next_to_{a_thing} on_the_road_to_the_{place} above_the_{thing} just_inside_the_{place} a_mile_from_the_{place}
past: carried dropped painted repaired borrowed sold found measured polished opened noticed bought returned stole
    wrapped described moved cleaned hid lifted broke examined forgot brought chose kept needed admired pushed touched
    photographed weighed lost ordered fixed threw caught held pulled shook tore burned buried changed chased destroyed
    drew enjoyed gathered guarded ignored joined judged kicked loved missed mixed offered packed raised received
    refused
    remembered replaced searched shared stretched studied taught used visited wanted washed wore
base: carry paint repair borrow sell find measure polish open bring clean move wrap describe fix lift return hide
    choose
    keep push watch draw throw catch hold pull shake burn change chase destroy enjoy gather guard ignore join
    judge kick
    mix offer pack raise refuse replace search share stretch study use visit wash wear
went: walked traveled drove ran hurried wandered rode sailed moved climbed rushed returned jumped crawled marched swam
    stepped headed flew danced slipped stumbled strolled raced
toward: to_the_{place} through_the_{place} toward_the_{quality}_{place} across_the_{place} past_the_{place}
    from_{town}_to_{town} around_the_{place} back_to_{town} into_the_{place} along_the_{place} away_from_the_{place}
said: said thought believed explained whispered heard claimed knew hoped shouted admitted argued insisted imagined
asked: said asked whispered shouted explained repeated answered replied cried
fact: the_{thing}_was_{quality} the_{place}_would_close_{future} it_was_too_{quality} nobody_liked_the_{food}
    the_{animal}_had_escaped the_{weather}_would_stop_soon there_was_no_more_{food} the_{job}_was_{mood}
    the_{thing}_belonged_to_{name} the_price_was_only_{number}_dollars the_{place}_was_empty {name}_was_right
sound: humming ringing laughing shouting singing knocking breathing whistling sneezing crying playing coughing
    snoring chewing scratching
because: because_the_{weather}_was_getting_worse because_{fact} since_there_was_no_{food}_left
    although_{single}_seemed_{mood}
    while_{person}_waited_{where} until_the_{animal}_came_back before_the_{thing}_fell_off_the_{thing}
    so_{single}_{went}_{toward} but_{single}_was_too_{mood}_to_answer when_the_{job}_opened_the_{thing}
    if_the_{weather}_does_not_stop and_then_{went}_{toward} as_if_{fact} even_though_{fact} unless_{fact}
polite: please thank_you of_course I_think for_example after_all in_fact as_usual at_least by_the_way no_doubt indeed
hour: nine_o'clock half_past_ten quarter_to_seven noon ten_fifteen six_thirty eight_forty-five two_o'clock
    twenty_past_four five_to_eleven
small: shirt stick key ring plate cup chain leaf pen shell cap belt stone rug sock bulb
look: today this_morning tonight in_that_coat in_this_light without_your_hat
"""
_RULES = {
    "statement": """
{person} {past} {object} {where}.
{person} {adverb} {past} {object}.
{person} {past} {object} {time}.
{person} {went} {toward} {time}.
{person} {went} {adverb} {toward}.
{time}, {person} {past} {object} {where}.
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
The {thing} costs {digits} dollars {where}.
{name} will {base} the {thing} {future}.
I would like to {base} {object} {future}.
They never {base} the {material} {thing} without asking.
You should {base} the {quality} {thing} before you leave.
Most of the {many} were {quality}, but the {thing} was {quality}.
The {job}, who was very {mood}, {past} {object}.
{person} {past} {object} {because}.
{person} {went} {toward} {because}.
Neither {name} nor {name} could {base} the {thing}.
The more {food} we ate, the more {mood} we felt.
{name} gets {mood} whenever the {animal} comes {toward}.
"{fact}," {asked} the {job}.
The train from {town} leaves at {hour} and arrives {where}.
Page {digits} shows {a quality thing} and {number} {many}.
{polite}, {person} {past} the {thing} {time}.
Half of the {food} was eaten by {a quick animal}.
{name}, {name} and {name} {went} {toward}.
A {thing}, a {small} and {number} {many} lay {where}.
All of us were {mood}, and the {job} was the most {mood} of all.
I have never seen such {a quality thing} as the one {where}.
As a child, {name} used to {base} {number} {many} every day.
His {thing} is less {quality} than yours.
It was {name}, not {name}, who {past} the {material} {thing}.
""",
    "question": """
Did {person} {base} the {thing} {where}?
Where is the {quality} {thing} that {name} {past}?
Why was the {job} so {mood} {time}?
Could you {base} the {thing} {future}, please?
How many {many} did you see {where}?
Have you ever been to the {place} in {town}?
Who {past} the {material} {thing}?
What would you do with {a quality thing}?
Is it true that {fact}?
Would you rather eat {food} or {food}?
When will {name} return from the {place}?
Which {thing} is yours, the {quality} one or the {quality} one?
Does the {animal} always sleep {where}?
Shall we go {toward} {future}?
Isn't the {weather} {where} unusual for {month}?
""",
    "request": """
Please {base} the {thing} {future}.
Don't touch the {quality} {thing}!
What {a quick animal}!
Be careful with the {material} {thing}, it is {quality}.
Put the {thing} {where}, and wash your hands.
Let's go {toward} {future}.
How {mood} you look {look}!
Take {number} {many}, a little {food}, and mix them {adverb}.
Turn left at the {place}, then walk {number} {unit}.
Never {base} {a thing} that is {quality}.
""",
    "short": """
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
{a quality thing}.
""",
}
_KINDS = {
    ("statement",): 58,
    ("question",): 14,
    ("request",): 8,
    ("short",): 8,
    ("statement", "short"): 3,
    ("statement", "question"): 3,
    ("short", "statement"): 3,
    ("request", "statement"): 2,
    ("statement", "statement", "short"): 1,
}
"""What a text is made of, and how often in a hundred."""
_SLOT = re.compile(r"\{(a )?([a-z ]+)\}")


def _read(text: str) -> dict[str, list[str]]:
    slots: dict[str, list[str]] = {}
    for line in text.strip().splitlines():
        slot, colon, choices = line.partition(": ") if not line.startswith(" ") else ("", "", line)
        if colon:
            latest = slots[slot.replace("_", " ")] = []
        latest += [choice.replace("_", " ") for choice in choices.split()]
    return slots


WORDS = _read(_WORDS) | {
    "digits": [str(number) for number in (7, 12, 15, 19, 23, 28, 31, 40, 46, 54, 67, 72, 80, 93, 110, 250, 300, 475)],
    "year": [str(year) for year in range(1805, 2020, 3)],
}
RULES = {kind: rules.strip().splitlines() for kind, rules in _RULES.items()}


def sentences(seed: int) -> Iterator[str]:
    """Endless different texts of 2 to about 30 words, the same ones for the same seed."""
    random_ = random.Random(f"demo text {seed}")
    seen: set[str] = set()
    while True:
        (kinds,) = random_.choices(list(_KINDS), list(_KINDS.values()))
        text = " ".join(_sentence(random_.choice(RULES[kind]), random_) for kind in kinds)
        if text not in seen:
            seen.add(text)
            yield text


def _sentence(rule: str, random_: random.Random) -> str:
    text = _filled(rule, random_)
    first = next(place for place, character in enumerate(text) if character.isalnum())
    return text[:first] + text[first].upper() + text[first + 1 :]


def _filled(rule: str, random_: random.Random) -> str:
    def fill(slot: re.Match[str]) -> str:
        words = _filled(random_.choice(WORDS[slot[2]]), random_)
        return f"{_article(words)} {words}" if slot[1] else words

    return _SLOT.sub(fill, rule)


def _article(words: str) -> str:
    silent_h = words.startswith(("hour", "honest"))
    sounds_like_y_or_w = words.startswith(("uni", "use", "usual", "one"))
    return "an" if (words[0].lower() in "aeiou" and not sounds_like_y_or_w) or silent_h else "a"
