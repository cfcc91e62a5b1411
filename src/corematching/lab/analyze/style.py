"""The look of the pages: one style sheet, light, dark and on paper."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f7f7f5;--ink:#1c1e21;--soft:#5d636b;--rule:#dcdedf;
--paper:#c2570c;--ours:#0b7a6f;--attention:#2563eb;--cosine:#b7791f;--product:#8b3fc7;--gone:#b3b8be}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e7e9ea;--soft:#a0a7ae;
--rule:#343a40;--paper:#f59354;--ours:#43c6b6;--attention:#74a4ff;--cosine:#e6b450;
--product:#c792ea;--gone:#5b636b}}
@media print{:root{color-scheme:light;--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#ccc;
--paper:#c2570c;--ours:#0b7a6f;--attention:#2563eb;--cosine:#b7791f;--product:#8b3fc7;
--gone:#b3b8be}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;letter-spacing:-.01em;text-wrap:balance}
h2{font-size:21px;margin:56px 0 8px;letter-spacing:-.005em}
h3{font-size:17px;margin:0 0 4px}
p{margin:8px 0;max-width:74ch}
a{color:var(--attention)}
.lead{font-size:17px;color:var(--soft)}
.soft,figcaption{color:var(--soft);font-size:14px;line-height:1.5}
figure{margin:0}
figcaption{margin-top:6px;max-width:62ch}
figcaption b,.soft b{color:var(--ink);font-weight:600}
code{font:13.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.scene{display:grid;grid-template-columns:minmax(200px,320px) 1fr;gap:32px;margin:28px 0;
align-items:start}
.scene svg,.heat{width:100%;height:auto;display:block;border-radius:6px;background:var(--card)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 20px;margin:0}
dt{color:var(--soft);font-size:14px;padding-top:2px}
dd{margin:0;overflow-wrap:anywhere}
dd.said{font-size:18px;font-weight:600}
.two,.three{display:grid;gap:28px 32px;margin-top:20px}
.two{grid-template-columns:repeat(2,minmax(0,1fr))}
.three{grid-template-columns:repeat(3,minmax(0,1fr));gap:16px 20px}
.chart{width:100%;height:auto;display:block;overflow:visible}
.chart text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
.chart .title{font-size:11.5px}
.chart path{fill:none}
.axis{stroke:var(--soft);stroke-width:1}
.grid{stroke:var(--rule);stroke-width:1}
.line{stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.dashed{stroke-dasharray:5 4}
.chart .band{fill:currentColor;opacity:.16;stroke:none}
.dots{stroke:currentColor;stroke-width:4.5;stroke-linecap:round;opacity:.55}
.mark{stroke:currentColor;stroke-width:1.2;stroke-dasharray:3 3}
.chart .word{fill:currentColor}
.hint{fill:transparent;stroke:none}
.paper{color:var(--paper)}.ours{color:var(--ours)}.attention{color:var(--attention)}
.cosine{color:var(--cosine)}.product{color:var(--product)}.gone{color:var(--gone)}
.plain{color:var(--soft)}
.key{display:flex;flex-wrap:wrap;gap:2px 12px;margin:4px 0 2px;font-size:12.5px;color:var(--soft)}
.key span::before{content:"";display:inline-block;width:18px;height:0;margin-right:6px;
vertical-align:4px;border-top:3px solid currentColor;border-radius:2px}
.key .dashed::before{border-top-style:dashed}
.key .dot::before{width:8px;height:8px;border:0;border-radius:50%;background:currentColor;
vertical-align:0;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.key i{font-style:normal;color:var(--soft)}
.scale{display:flex;align-items:center;gap:8px;font-size:13px;color:var(--soft);margin-top:6px}
.scale img{width:110px;height:9px;border-radius:3px}
.strip{display:flex;flex-wrap:wrap;gap:4px 2px;padding:12px 0;margin:16px 0 0;position:sticky;top:0;
background:var(--bg);z-index:2;border-bottom:1px solid var(--rule)}
.strip label{position:relative;cursor:pointer;text-align:center;font-size:11px;line-height:1.3;
color:var(--soft);padding:1px;border-radius:5px;border:2px solid transparent}
.strip label:hover{background:var(--card)}
.strip label:has(:checked){border-color:var(--ink);color:var(--ink);font-weight:700}
.strip label:has(:focus-visible){outline:2px solid var(--attention);outline-offset:1px}
.strip input{position:absolute;inset:0;opacity:0;margin:0;cursor:pointer}
.strip img{display:block;width:26px;height:26px;border-radius:2px;image-rendering:pixelated}
.strip img+img{margin-top:2px}
.layer{display:none;padding-top:24px}
.chosen{border-top:3px solid currentColor;padding-top:8px}
.chosen h4{margin:0 0 2px;font-size:15.5px}
.chosen .soft{min-height:3em}
h4{font-size:15px;margin:32px 0 0}
table{border-collapse:collapse;width:100%;font-size:14px;margin-top:12px;
font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal}
th:first-child,td:first-child{text-align:left;padding-left:0}
tr.all td{font-weight:700;border-top:2px solid var(--soft)}
td small{color:var(--soft);font-size:12px}
.wide{overflow-x:auto}.wide th,.wide td{padding:4px 5px;font-size:13px}.wide small{font-size:11px}
.terms dt{grid-column:1/-1;color:var(--ink);font-weight:600;padding-top:10px}
.terms dd{grid-column:1/-1;color:var(--soft);font-size:14.5px;max-width:78ch}
footer{margin-top:56px;padding-top:14px;border-top:1px solid var(--rule)}
@media screen and (max-width:760px){.scene,.two{grid-template-columns:minmax(0,1fr)}.three{
grid-template-columns:repeat(2,minmax(0,1fr))}main{padding:24px 16px 48px}h1{font-size:25px}}
@media print{@page{margin:12mm}body{font-size:10.5pt}main{max-width:none;padding:0}
.scene{grid-template-columns:52mm 1fr;gap:20px}dd.said{font-size:15px}
.strip{display:none}.layer{display:block!important;break-before:page;zoom:.7}
.layer .heat{width:56mm;margin:0 auto}.layer h4{margin-top:14px}
.layer thead{display:none}.layer table{display:block}.layer tbody{display:grid;column-gap:28px;
grid-template-columns:1fr 1fr}.layer tr{display:grid;grid-template-columns:1fr auto 4.5em}
.layer td{padding:2px 0}
.layer .two,.layer .three{gap:8px 20px;margin-top:8px}
figure,.chosen,tr{break-inside:avoid}h2,h3,h4{break-after:avoid}}
@supports not selector(:has(*)){.layer{display:block}}
"""
