import numpy as np
import pytest

from fastai_crl.images.colors import COLORS, palette


def called(*names):
    "The names of the colours of channels."
    return [next(name for name, rgb in COLORS.items() if rgb == tuple(row)) for row in palette(names).tolist()]


@pytest.mark.parametrize(
    ("color", "names"),
    [
        ("blue", "DAPI,dapi,w1DAPI,Hoechst 33342,mTagBFP2,DNA,nuclei,405,405 nm,Alexa 350,BV421,Blue,wv 390 - Blue"),
        ("cyan", "CFP,mTurquoise2,mCerulean,eFluor 450,Cyan"),
        ("green", "FITC,FITC 38,GFP,EGFP,tubulin-GFP,mNeonGreen,AF488,Alexa Fluor 488,488,SYTOX Green,Opal 520,GREEN"),
        ("yellow", "YFP,mVenus,Alexa 532,Yellow"),
        ("red", "TRITC,RFP,mCherry,Cy3,Cy3.5,tdTomato,Texas Red,Alexa-568,AF594,561nm,MitoTracker Red,Red"),
        ("magenta", "Cy5,Cy5.5,PE-Cy7,Alexa 647,640,Far Red,MitoTracker Deep Red,DRAQ5,iRFP670,Magenta"),
        ("gray", "brightfield,Bright-Field,BF,DIC,Phase contrast,TL,Transmitted Light,grey,Gray"),
        ("gray", "actin,p53,rhodopsin,aquaporin-1,nucleoli,CD340,Ki67,ER,channel 3,7,100,hundred,colored,X"),
    ],
)
def test_stains_have_the_colours_of_the_field_and_other_lone_channels_are_grey(color, names):
    for name in names.split(","):
        assert called(name) == [color], name
        if color != "gray":
            assert called("protein", name) == ["green" if color == "red" else "red", color], name


@pytest.mark.parametrize(
    ("names", "colors"),
    [
        ("DAPI FITC TRITC Cy5", "blue green red magenta"),
        ("Cy5 TRITC FITC DAPI", "magenta red green blue"),
        ("GFP mCherry RFP", "green red orange"),
        ("BF DAPI tubulin actin", "gray blue red green"),
        ("dapi blue", "cyan blue"),  # a colour's own name goes first
        ("GFP EGFP FITC p53", "green yellow red blue"),  # no second choice is left: as one that is not known
        ("red green blue yellow", "red green blue yellow"),
        ("a b c d e f g h i", "red green blue yellow magenta cyan orange gray gray"),
    ],
)
def test_no_colour_is_given_twice(names, colors):
    assert called(*names.split()) == colors.split()


def test_no_channel():
    assert palette([]).shape == (0, 3) and palette([]).dtype == np.float32
