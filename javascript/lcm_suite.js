// Shows what the chosen sampler reads, and keeps the tab "LCM Distil" up to date while it is open.
const LCM_SUITE_READERS = {
    lcm_suite_gamma: ["TCD Suite"],
    lcm_suite_original_steps: ["LCM Suite", "TCD Suite"],
};

function lcmSuiteShowWhatIsRead() {
    for (const tab of ["txt2img", "img2img"]) {
        const sampler = gradioApp().querySelector(`#${tab}_sampling input`);
        if (!sampler) continue;
        for (const [name, readers] of Object.entries(LCM_SUITE_READERS)) {
            const slider = gradioApp().querySelector(`[id$="${tab}_lcm_suite_${name}"]`);
            if (slider) slider.style.display = readers.includes(sampler.value) ? "" : "none";
        }
    }
}

onUiLoaded(() => {
    setInterval(lcmSuiteShowWhatIsRead, 500); // a sampler is also changed by pasting, and by buttons
    setInterval(() => {
        const tab = gradioApp().querySelector("#tab_lcm_distil");
        const button = gradioApp().querySelector("#lcm_distil_refresh");
        if (!document.hidden && tab && tab.style.display !== "none" && button) button.click();
    }, 2000);
    const use = gradioApp().querySelector("#lcm_distil_use");
    if (use) use.addEventListener("click", () => switch_to_txt2img());
});
